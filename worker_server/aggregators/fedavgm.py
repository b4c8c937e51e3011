"""FedAvgM (Hsu et al., arXiv 1909.06335): momentum at the server.

With the clients' mean change d, momentum m and rate r: v = m v + d; w = w + r v. v begins at 0.
"""

from torch import Tensor

from shared.job import FedAvgM, Job
from worker_server.aggregators.fedavg import weighted_mean
from worker_server.aggregators.method import Change, Method, Tensors


def step(job: Job, start: Tensors, change: Change, state: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    settings = job.aggregation
    assert isinstance(settings, FedAvgM)
    values: dict[str, Tensor] = {}
    velocities: dict[str, Tensor] = {}
    for name, value in start.items():
        velocity, before = change.delta[name].double(), state.get(f"momentum/{name}")
        if before is not None:
            velocity = settings.momentum * before.to(velocity.device).double() + velocity
        values[name] = (value.double() + settings.server_learning_rate * velocity).float()
        velocities[f"momentum/{name}"] = velocity.float()
    return values, velocities


METHOD = Method(weighted_mean, step)
