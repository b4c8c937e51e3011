"""SCAFFOLD (Karimireddy et al., arXiv 1910.06378, algorithm 1, option II): control variates against client drift.

Client i's local step is y = y - lr (g(y) - c_i + c); after K of them c_i+ = c_i - c + (x - y) / (K lr), x the round's
start. The server takes w = x + r d with the clients' mean change d = mean(y) - x, and c = c + |S| / N mean(c_i+ - c_i),
for S of N clients (cohort.clients). As c_i+ - c_i = (x - y_i) / (K lr) - c, the mean of it is -d / (K lr) - c: clients
hand in nothing but their values. Means are weighted alike (rounds.weighting). c begins at 0.
"""

import torch
from torch import Tensor

from shared.job import Job, Scaffold
from shared.payload.messages import CONTROL
from worker_server.aggregators.fedavg import weighted_mean
from worker_server.aggregators.method import Change, Method, Tensors


def step(job: Job, start: Tensors, change: Change, state: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    settings = job.aggregation
    assert isinstance(settings, Scaffold)
    way = job.rounds.local_steps * job.training.learning_rate
    share = min(1.0, change.updates / job.cohort.clients)
    values: dict[str, Tensor] = {}
    controls: dict[str, Tensor] = {}
    for name, value in start.items():
        delta = change.delta[name].double()
        before = state.get(CONTROL + name)
        control = torch.zeros_like(delta) if before is None else before.double()
        values[name] = (value.double() + settings.server_learning_rate * delta).float()
        controls[CONTROL + name] = (control + share * (-delta / way - control)).float()
    return values, controls


METHOD = Method(weighted_mean, step)
