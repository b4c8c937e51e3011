"""FedAvg (McMahan et al., arXiv 1602.05629, algorithm 1): the mean of the clients' values, weighted."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.job import Job
from worker_server.aggregators.method import Method, Tensors, Update, add, difference


def weighted_mean(job: Job, start: Tensors, updates: Sequence[Update]) -> dict[str, Tensor]:
    """The mean difference, summed in the order given; one tensor of one client at a time is in memory."""
    total = sum(update.weight for update in updates)
    mean: dict[str, Tensor] = {}
    for name, value in start.items():
        mean[name] = torch.zeros_like(value, dtype=torch.float64)
        for update in updates:
            mean[name] += difference(start, update, name) * (update.weight / total)
    return mean


METHOD = Method(weighted_mean, add)
