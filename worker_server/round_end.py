"""The end of a round: updates in, the values that all go on from out. No threads, no disk."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.job import Job
from shared.logs import event
from worker_server.aggregators import METHODS
from worker_server.aggregators.bounding import bounded
from worker_server.aggregators.fedex_lora import mean_products, residuals
from worker_server.aggregators.method import Change, Tensors, Update
from worker_server.replicas import Replicas

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Aggregated:
    """`values` by name, float32; the method's `state`; `bounded`: how many updates were scaled down."""

    values: Tensors
    state: Tensors
    bounded: int = 0


def aggregate(
    job: Job, start: Tensors, updates: Sequence[Update], state: Tensors, replicas: Replicas | None = None
) -> Aggregated:
    """The job's method, with the updates of all `replicas`.

    Where no update came, where too few came for the method to judge them, or where its result overflows, all go on
    from `start`, which is then what `values` is, and the state stays what it was.
    """
    method = METHODS[job.aggregation.type]
    within = bounded(start, updates, job.aggregation.max_update_norm)
    scaled = [update.client for update in within if update.scale != 1.0]
    if scaled:
        event(logger, "updates_bounded", level=logging.WARNING, clients=",".join(scaled))
    unchanged = Aggregated(start, state, len(scaled))
    delta = method.combine(job, start, within) if within else None
    count = len(within)
    if replicas is not None:
        count = replicas.total(count)
        empty = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in start.items()}
        delta = replicas.mean(delta or empty, sum(update.weight for update in within))
    if delta is None or count == 0:
        event(logger, "round_without_change", level=logging.WARNING, updates=count)
        return unchanged
    values, after = method.step(job, start, Change(delta, count), state)
    if job.aggregation.lora == "exact":
        products = mean_products(start, within)
        if replicas is not None:
            products = replicas.mean(products, sum(update.weight for update in within))
        after |= residuals(products, values, state)
    if not all(bool(value.isfinite().all()) for value in (*values.values(), *after.values())):
        event(logger, "aggregate_overflowed", level=logging.WARNING, updates=count)
        return unchanged
    return Aggregated(values, after, len(scaled))
