"""What the server keeps between rounds, on disk at each boundary: the trunk's state, aggregated heads and tails, and
the aggregator's state."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from shared import state_files
from shared.error_feedback import Compressed
from shared.errors import CheckpointError
from shared.job import CentralPrivacy, Job
from shared.logs import event
from shared.model.checkpoint import Fingerprint
from shared.model.residuals import modules_of
from shared.payload.messages import CONTROL, RESIDUAL
from shared.prefixes import under
from worker_server.box import Box, box_in
from worker_server.no_trunk import NoTrunk
from worker_server.trunk import Trunk

KEPT_CHECKPOINTS = 2
BOUND = "bound.json"

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """`round` completed rounds; `averages` of the clients' parts by global name (empty before the first), as clients
    hold them.

    `initial`: what those begin with; `aggregator`: the state of its method of aggregation. `counted`: by client, how
    many rounds were complete when an update of it last counted. `unsent`: what clients were not told of the averages;
    `change`: what brings those who hold the last round's start to `averages`, where that is what travels, and not on
    disk. `box`: under a group's key, the averages that the server cannot open, in place of `averages`; None before the
    first. `kept_at`: when (monotonic) the checkpoint of that round was written or read. `clients`: those from whom the
    next round is drawn, where it is (cohort.sampled).
    """

    folder: Path
    job: Job
    fingerprint: Fingerprint
    trunk: Trunk | NoTrunk
    round: int = 0
    averages: dict[str, Tensor] | None = None
    initial: Callable[[], dict[str, Tensor]] = dict
    aggregator: Mapping[str, Tensor] = field(default_factory=dict)
    counted: Mapping[str, int] = field(default_factory=dict)
    unsent: Mapping[str, Tensor] = field(default_factory=dict)
    change: Compressed | None = None
    box: Box | None = None
    kept_at: float | None = None
    clients: tuple[str, ...] = ()

    @property
    def checkpoint(self) -> Path:
        """Where the last completed round lies."""
        return state_files.path_of(self.folder, self.round)

    def begin(self) -> None:
        """Continue from the newest readable checkpoint, or begin with `checkpoint-0`.

        Raises CheckpointError if there are checkpoints of another job or model, or none that is readable; under central
        privacy, if the newest is not.
        """
        central = isinstance(self.job.privacy, CentralPrivacy)
        if state_files.resume(self.folder, self.restore, _refuse_older if central else _say_unreadable):
            event(logger, "resumed", folder=str(self.folder), rounds=self.round)
        else:
            self.save()

    def restore(self, number: int) -> None:
        """Go back to `checkpoint-<number>`. Raises CheckpointError."""
        tensors, facts = state_files.load(self.folder, number)
        if facts["job"] != self.job.digest().hex():
            raise CheckpointError(
                f"{self.folder}: belongs to another job",
                hint="use another --state folder, or the job file it began with",
            )
        if facts["model"] != vars(self.fingerprint):
            raise CheckpointError(f"{self.folder}: belongs to another model", hint="use another --state folder")
        averages = under("average/", tensors)
        self.unsent = under("unsent/", tensors)
        self.change = None
        self.box = box_in(tensors)
        self.trunk.load_state(tensors, float(facts["steps"]))
        self.averages = averages
        self.aggregator = under("aggregator/", tensors)
        self.trunk.take_residuals(self.aggregator)
        self.clients = tuple(facts.get("clients", ()))
        self.counted = dict(facts.get("counted", {}))
        self.round = number
        self.kept_at = time.monotonic()

    def start(self) -> dict[str, Tensor]:
        """What every client's head and tail begin the round with, of what is trained in them; nothing under a group's
        key, which keeps it from the server. Raises ModelError.
        """
        if self.job.aggregation.group_key is not None:
            return {}
        return self.averages or self.initial()

    def for_clients(self) -> dict[str, Tensor]:
        """What every client is told at a round's start: averages, control variates, residuals of head and tail."""
        averages = self.averages or {}
        residuals = {RESIDUAL + module for module in modules_of(averages)}
        told = {n: value for n, value in self.aggregator.items() if n.startswith(CONTROL) or n in residuals}
        return {**averages, **told}

    def complete_round(
        self,
        averages: dict[str, Tensor],
        aggregator: Mapping[str, Tensor] | None = None,
        counted: Iterable[str] = (),
        unsent: Mapping[str, Tensor] | None = None,
        change: Compressed | None = None,
        box: Box | None = None,
    ) -> None:
        """One more round is done, with these averages, of these clients' updates; on disk before anyone is told.

        Without a new `box` the last one goes on.
        """
        self.averages, self.unsent, self.change = averages, unsent or {}, change
        self.box = box or self.box
        self.aggregator = aggregator or {}
        self.round += 1
        self.counted = {**self.counted, **dict.fromkeys(counted, self.round)}
        self.save()

    def bind(self, round: int, clients: Sequence[str]) -> None:
        """Keep, flushed to disk, whose masked sum `round` is. Raises CheckpointError if the disk refuses.

        Apart from the checkpoints: the compute thread has no part in it.
        """
        state_files.write_json(
            self.folder / BOUND, {"job": self.job.digest().hex(), "round": round, "clients": clients}
        )

    def bound(self) -> frozenset[str]:
        """Whose masked sum the round to come is, if members were asked to unmask it before. Raises CheckpointError."""
        path = self.folder / BOUND
        if not path.exists():
            return frozenset()
        kept = state_files.read_json(path)
        try:
            due = kept["job"] == self.job.digest().hex() and kept["round"] == self.round
            return frozenset(str(name) for name in kept["clients"]) if due else frozenset()
        except (KeyError, TypeError):
            raise CheckpointError(f"{path}: not what this server wrote") from None

    def save(self) -> None:
        """Write `checkpoint-<round>`. Raises CheckpointError if the disk refuses."""
        tensors = self.trunk.state() | {f"average/{name}": t for name, t in (self.averages or {}).items()}
        tensors |= {f"unsent/{name}": t for name, t in self.unsent.items()}
        tensors |= {} if self.box is None else self.box.tensors()
        tensors |= {f"aggregator/{name}": t for name, t in self.aggregator.items()}
        facts = {
            "job": self.job.digest().hex(),
            "model": vars(self.fingerprint),
            "steps": self.trunk.steps,
            "clients": self.clients,
            "counted": dict(self.counted),
        }
        path = state_files.save(self.folder, self.round, tensors, facts, keep=KEPT_CHECKPOINTS)
        self.kept_at = time.monotonic()
        event(logger, "checkpoint_written", path=str(path), rounds=self.round)


def _say_unreadable(number: int, error: CheckpointError) -> None:
    event(logger, "checkpoint_unreadable", level=logging.WARNING, number=number, reason=error.message)


def _refuse_older(number: int, error: CheckpointError) -> None:
    """The round after an older one was noised and told already; with other noise it would cost the clients again."""
    raise CheckpointError(
        f"{error.message}: with privacy.type=central no older one is gone back to",
        hint=f"put a copy of checkpoint-{number} back, or begin the job anew, under another name, with another --state",
    )
