"""FedSGD (McMahan et al., arXiv 1602.05629, section 2): the clients' mean gradient, and one step for all.

Each client hands in the gradient of its own mean loss at the values that all have; weighted by target tokens, the mean
is the gradient of one process on the concatenated batch. The step is that of the job's optimizer with its schedule,
clipped by the norm of what clients hand in; its moments are the state. So the run is that process's, whatever rows the
clients have.
"""

import torch
from torch import Tensor, nn

from shared.job import Job
from shared.model.optimizer import PartOptimizer
from worker_server.aggregators.fedavg import weighted_mean
from worker_server.aggregators.method import Change, Method, Tensors

STEPS = "steps"


def step(job: Job, start: Tensors, change: Change, state: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters = {name: nn.Parameter(value.detach().float().clone()) for name, value in start.items()}
    optimizer = PartOptimizer(parameters, job.training, job.total_steps)
    optimizer.load_state(state, float(state[STEPS]) if STEPS in state else 0.0)
    for name, parameter in parameters.items():
        parameter.grad = change.delta[name].to(parameter.device, torch.float32)
    optimizer.step()
    values: dict[str, Tensor] = {name: parameter.detach() for name, parameter in parameters.items()}
    return values, optimizer.state() | {STEPS: torch.tensor(optimizer.steps)}


METHOD = Method(weighted_mean, step)
