"""The end of a round: updates in, the values that all go on from out. No threads, no disk."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.job import CentralPrivacy, Job
from shared.logs import event
from worker_server.aggregators import METHODS
from worker_server.aggregators.bounding import bounded
from worker_server.aggregators.fedex_lora import mean_products, residuals
from worker_server.aggregators.method import Change, Tensors, Update
from worker_server.central_noise import noised
from worker_server.masking import Summed
from worker_server.replicas import Replicas

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Aggregated:
    """`values` by name, float32; the method's `state`; `bounded`: how many updates were scaled down."""

    values: Tensors
    state: Tensors
    bounded: int = 0


def aggregate(
    job: Job,
    start: Tensors,
    updates: Sequence[Update],
    state: Tensors,
    replicas: Replicas | None = None,
    summed: Summed | None = None,
) -> Aggregated:
    """The job's method, with the updates of all `replicas`.

    `summed`: the mean change of what clients hold, where updates are masked; `updates` are then of the other names.

    Where no update came, where too few came for the method to judge them, or where its result overflows, all go on
    from `start`, which is then what `values` is, and the state stays what it was.
    """
    method = METHODS[job.aggregation.type]
    central = job.privacy if isinstance(job.privacy, CentralPrivacy) else None
    limit = job.aggregation.max_update_norm if central is None else central.clip_norm
    within = bounded(start, updates, limit)
    # Under privacy clients clip by themselves, and every one of them may: that is nothing to tell.
    scaled = [update.client for update in within if update.scale != 1.0 and central is None]
    if scaled:
        event(logger, "updates_bounded", level=logging.WARNING, clients=",".join(scaled))
    unchanged = Aggregated(start, state, len(scaled))
    delta = _change(job, start, within, summed)
    count = len(within) if summed is None else len(summed.contributors)
    weight = sum(update.weight for update in within) if summed is None else summed.weight
    if replicas is not None:
        count = replicas.total(count)
        empty = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in start.items()}
        delta = replicas.mean(delta or empty, weight)
    if delta is None or count == 0:
        event(logger, "round_without_change", level=logging.WARNING, updates=count)
        return unchanged
    delta = noised(job, delta, count, replicas)
    values, after = method.step(job, start, Change(delta, count), state)
    if job.aggregation.lora == "exact":
        products = mean_products(start, within)
        if replicas is not None:
            products = replicas.mean(products, weight)
        after |= residuals(products, values, state)
    if not all(bool(value.isfinite().all()) for value in (*values.values(), *after.values())):
        event(logger, "aggregate_overflowed", level=logging.WARNING, updates=count)
        return unchanged
    return Aggregated(values, after, len(scaled))


def _change(job: Job, start: Tensors, updates: Sequence[Update], summed: Summed | None) -> dict[str, Tensor] | None:
    combine = METHODS[job.aggregation.type].combine
    if summed is None:
        return combine(job, start, updates) if updates else None
    seen = {name: value for name, value in start.items() if name not in summed.delta}
    own = combine(job, seen, updates) if updates else {}
    return None if own is None else {**summed.delta, **own}
