"""Coordinate-wise median (Yin et al., arXiv 1803.01498, definition 1): of an even number, the mean of the middle two.

Every client counts the same, whatever it says it weighs.
"""

from collections.abc import Sequence

from torch import Tensor

from shared.job import Job
from worker_server.aggregators.method import Method, Tensors, Update, add, differences


def median(job: Job, start: Tensors, updates: Sequence[Update]) -> dict[str, Tensor] | None:
    if len(updates) < job.aggregation.least_updates:
        return None
    middle = [(len(updates) - 1) // 2, len(updates) // 2]
    return {name: differences(start, updates, name).sort(dim=0).values[middle].mean(dim=0) for name in start}


METHOD = Method(median, add)
