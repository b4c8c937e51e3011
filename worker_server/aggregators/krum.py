"""Krum (Blanchard et al., NIPS 2017, section 4): the one update that lies nearest to its neighbours.

A client's score is the sum of the squared distances from its update, over all tensors, to the n - f - 2 nearest others;
the lowest wins, of equal ones the first by name. n >= 2 f + 3. Where fewer updates than members came, the lost ones are
counted among the f: f is then at most (n - 3) / 2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.job import AnyKrum, Job
from worker_server.aggregators.method import Method, Tensors, Update, add, difference, differences


def ranking(job: Job, start: Tensors, updates: Sequence[Update]) -> tuple[list[int], int] | None:
    """The updates' places, best score first, and f; None with fewer than 3."""
    settings, count = job.aggregation, len(updates)
    assert isinstance(settings, AnyKrum)
    if count < settings.least_updates:
        return None
    byzantine = min(settings.byzantine, (count - 3) // 2)
    distances = squared_distances(start, updates)
    nearest = distances.fill_diagonal_(torch.inf).sort(dim=1).values[:, : count - byzantine - 2]
    scores = nearest.sum(dim=1).tolist()
    return sorted(range(count), key=lambda place: (scores[place], place)), byzantine


def squared_distances(start: Tensors, updates: Sequence[Update]) -> Tensor:
    """(n, n) float64 on the CPU."""
    total = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for name in start:
        stacked = differences(start, updates, name).reshape(len(updates), -1)
        for place, row in enumerate(stacked):
            total[place] += (stacked - row).square().sum(dim=1).cpu()
    return total


def krum(job: Job, start: Tensors, updates: Sequence[Update]) -> dict[str, Tensor] | None:
    ranked = ranking(job, start, updates)
    if ranked is None:
        return None
    best = updates[ranked[0][0]]
    return {name: difference(start, best, name) for name in start}


METHOD = Method(krum, add)
