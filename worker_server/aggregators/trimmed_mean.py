"""Coordinate-wise trimmed mean (Yin et al., arXiv 1803.01498, definition 2).

Of each coordinate the largest and the smallest floor(trim_ratio x n) values are left out. Every client counts the same,
whatever it says it weighs.
"""

from collections.abc import Sequence

from torch import Tensor

from shared.job import Job, TrimmedMean
from worker_server.aggregators.method import Method, Tensors, Update, add, differences


def trimmed_mean(job: Job, start: Tensors, updates: Sequence[Update]) -> dict[str, Tensor] | None:
    """None where so few updates came that nobody would be left out."""
    settings = job.aggregation
    assert isinstance(settings, TrimmedMean)
    count = len(updates)
    cut = settings.cut(count)
    if cut == 0:
        return None
    return {name: differences(start, updates, name).sort(dim=0).values[cut : count - cut].mean(dim=0) for name in start}


METHOD = Method(trimmed_mean, add)
