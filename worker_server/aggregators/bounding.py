"""Norm bounding (Sun et al., arXiv 1911.07963, "norm thresholding of updates").

An update whose difference to the round's start is longer than M is scaled to length M: d min(1, M / |d|). Its direction
still counts, so that an honest client with a large step is slowed down and not shut out.
"""

from collections.abc import Sequence
from dataclasses import replace

from worker_server.aggregators.method import Tensors, Update, difference


def norm(start: Tensors, update: Update) -> float:
    """L2, over all tensors."""
    squares = sum(float(difference(start, update, name).square().sum()) for name in start)
    return float(squares**0.5)


def bounded(start: Tensors, updates: Sequence[Update], limit: float | None) -> list[Update]:
    """The updates, none longer than `limit`."""
    if limit is None:
        return list(updates)
    return [
        replace(update, scale=limit / length) if (length := norm(start, update)) > limit else update
        for update in updates
    ]
