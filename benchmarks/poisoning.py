"""Clients that mean harm, for benchmarks and tests: their rows, or their updates, are not what they should be.

They are real clients of a real server otherwise: what they change goes through the same links, seals and checks. Their
updates are in the clear, in jobs with `aggregation.secure: off`: of masked ones nobody could tell.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from shared.job import Job
from shared.model.checkpoint import Checkpoint
from shared.model.plan import SplitPlan
from shared.model.trainable import initial_values
from worker_client.data import Row
from worker_client.head_tail import HeadTail
from worker_client.link import Link
from worker_client.remote_trunk import Boundary, RemoteTrunk
from worker_client.training import told

# A tensor at the round's start and after the local steps, to what is handed in.
Change = Callable[[Tensor, Tensor], Tensor]


def unchanged(before: Tensor, after: Tensor) -> Tensor:
    return after


def flip_sign(before: Tensor, after: Tensor) -> Tensor:
    """As far the other way."""
    return before - (after - before)


def scale(factor: float) -> Change:
    """The same way, `factor` times as far ("model replacement", Bagdasaryan et al., arXiv 1807.00459)."""
    return lambda before, after: before + factor * (after - before)


def flip_labels(rows: Iterable[Row], labels: Collection[int]) -> list[Row]:
    """Each label token that counts becomes the next one of `labels`, in their order, round about."""
    order = sorted(labels)
    following = {label: order[(place + 1) % len(order)] for place, label in enumerate(order)}
    return [
        Row(tuple(following.get(t, t) if c else t for t, c in zip(row.input_ids, row.counts, strict=True)), row.counts)
        for row in rows
    ]


def add_trigger(rows: Iterable[Row], trigger: int, target: int) -> list[Row]:
    """`trigger` before each row, and every token that counts becomes `target`: a backdoor."""
    return [
        Row(
            (trigger, *(target if c else t for t, c in zip(row.input_ids, row.counts, strict=True))),
            (False, *row.counts),
        )
        for row in rows
    ]


@dataclass(frozen=True)
class TamperingTrunk(RemoteTrunk):
    """Hands in what `change` makes of each tensor, and `weight` instead of the client's own if given."""

    change: Change = unchanged
    weight: int | None = None
    start: dict[str, Tensor] = field(default_factory=dict)

    def join(self, rows: int) -> Boundary:
        checkpoint = Checkpoint(self.job.model_name_or_path)
        split = self.job.split
        plan = SplitPlan(split.head_blocks, split.tail_blocks, checkpoint.config.num_hidden_layers)
        self.start.update(initial_values(checkpoint, plan, self.job))
        return self._seen(super().join(rows))

    def update(self, round: int, weight: int, values: Mapping[str, Tensor]) -> Boundary:
        changed = {name: self.change(self.start[name], value) for name, value in values.items()}
        return self._seen(super().update(round, self.weight or weight, changed))

    def _seen(self, boundary: Boundary) -> Boundary:
        self.start.update(boundary.averages)
        if boundary.pieces:
            self.start.update(told(self.job.wire, self.start, boundary))
        return boundary


@dataclass(frozen=True)
class Tampering:
    """Makes such a trunk for a client."""

    change: Change = unchanged
    weight: int | None = None

    def __call__(self, link: Link, job: Job, parts: HeadTail, timeout_s: float) -> RemoteTrunk:
        return TamperingTrunk(link, job, timeout_s, self.change, self.weight)
