"""A client's part under a group's key (aggregation.group_key): the server has boxes of averages, clients open them.

Rounds begin with the averages in the box that the server hands out; until there is one, with what everybody's parts
begin with. Whoever the server asks opens a round's sum, adds its mean to what the round began with, and seals the
averages for all: the same bits, whoever does it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from shared import flat
from shared.errors import AggregationError, SchemaError
from shared.flat import Shapes
from shared.job import Job
from shared.payload.messages import Sealed, Unopened
from shared.sealed_averages import seal, unseal
from shared.secure_aggregation.checks import words_of
from shared.secure_aggregation.client import Client
from shared.secure_aggregation.fixed_point import Floats
from shared.secure_aggregation.group_key import GroupKey
from shared.secure_aggregation.terms import Terms
from worker_client.remote_trunk import Boundary, GroupWords
from worker_client.steps import Report


@dataclass
class Group:
    """`initial`: what head and tail begin the job with, of what is handed in. `seen`: the last round that began, and
    the one whose averages it began with.
    """

    job: Job
    key: GroupKey
    initial: Callable[[], Mapping[str, Tensor]]
    seen: tuple[int, int] = field(init=False, default=(0, 0))

    def opened(self, boundary: Boundary, shapes: Shapes) -> Boundary:
        """The boundary with the averages of its box.

        Raises SchemaError for averages in the clear, of a round to come, or older than those of an earlier round;
        AggregationError or TensorError if they do not open.
        """
        if boundary.averages or boundary.pieces or boundary.control or boundary.residuals:
            raise SchemaError("the server has averages to tell; the job keeps them from it (aggregation.group_key)")
        round = self.job.rounds.count if boundary.round is None else boundary.round
        number = 0 if boundary.sealed is None else boundary.sealed.round
        if number > round:
            raise SchemaError(f"sealed averages for round {number}, and round {round} begins")
        if round >= self.seen[0] and number < self.seen[1]:
            raise SchemaError(f"averages of round {number} once more, after those of round {self.seen[1]}")
        self.seen = round, number
        if boundary.sealed is None:
            return replace(boundary, averages=dict(self.initial()))
        values = unseal(self.key, self.job.digest(), number, flat.length(shapes), boundary.box)
        return replace(boundary, sealed=None, box=b"", averages=flat.part(torch.from_numpy(values), shapes))

    def open_sum(
        self,
        client: Client,
        given: GroupWords,
        terms: Terms,
        round: int,
        start: Mapping[str, Tensor],
        report: Report,
    ) -> tuple[Sealed | Unopened, list[bytes]]:
        """The sum of `round`, which began with `start`, as averages for all; what goes to the server, and its frame.

        Raises TensorError and SchemaError for what can be no sum.
        """
        words = words_of(given.frame, terms.encoding, terms.length).copy()
        try:
            mean, _ = client.open_sum(given.message, words)
        except AggregationError as error:
            report({"event": "sum_unopened", "round": round, "reason": error.message})
            return Unopened(), []
        report({"event": "sum_opened", "round": round, "clients": given.message.contributors})
        averages = _moved(flat.join(start).numpy(), mean)
        return Sealed(round=round + 1), [seal(self.key, self.job.digest(), round + 1, averages)]


def _moved(start: Floats, mean: Floats) -> Floats:
    """`start` and the mean difference, float32 (L,), as FedAvg adds them; `start` where that overflows."""
    averages: Floats = (torch.from_numpy(start).double() + torch.from_numpy(mean).double()).float().numpy()
    return averages if bool(np.isfinite(averages).all()) else start
