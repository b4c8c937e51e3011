"""Sequential split learning: clients train one after the other, through one trunk (Gupta and Raskar, arXiv 1810.06060,
with the clients' parts averaged at the end of a round instead of handed on: SplitFedV2, arXiv 2004.12088, section 3).

The server is greedy's, whose every batch is a step of the trunk; here a client begins its local steps when the one
before it has ended them, so that no two batches are ever under way together.
"""

import threading
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks.joint_run import Trunks
from shared.errors import DeadlineExceeded
from shared.job import Job
from worker_client.batches import Batch
from worker_client.head_tail import HeadTail
from worker_client.link import Link
from worker_client.remote_trunk import Pending, RemoteTrunk


class Turns:
    """Whose turn it is of `clients`, each for `steps` steps."""

    def __init__(self, clients: int, steps: int) -> None:
        self.clients = clients
        self.steps = steps
        self.done = 0
        self.changed = threading.Condition()

    def whose(self) -> int:
        return self.done // self.steps % self.clients

    def wait(self, place: int, timeout_s: float) -> None:
        """Raises DeadlineExceeded."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.whose() == place, timeout_s):
                raise DeadlineExceeded(f"it was not this client's turn within {timeout_s:g} s")

    def stepped(self) -> None:
        with self.changed:
            self.done += 1
            self.changed.notify_all()


@dataclass(frozen=True)
class TurnTrunk(RemoteTrunk):
    """A remote trunk that sends nothing to train on before its turn."""

    turns: Turns
    place: int

    def send_forward(
        self,
        hidden: Tensor,
        batch: Batch,
        *,
        round: int,
        step: int,
        micro_batch: int,
        target_tokens: int,
        wants_gradient: bool,
    ) -> Pending:
        self.turns.wait(self.place, self.timeout_s)
        return super().send_forward(
            hidden,
            batch,
            round=round,
            step=step,
            micro_batch=micro_batch,
            target_tokens=target_tokens,
            wants_gradient=wants_gradient,
        )

    def gradient(self, pending: Pending) -> Tensor | None:
        gradient = super().gradient(pending)
        self.turns.stepped()
        return gradient


@dataclass
class InTurn(Trunks):
    """Trunks of these clients, in this order."""

    clients: tuple[str, ...] = ()
    local_steps: int = 1
    turns: Turns = field(init=False)

    def __post_init__(self) -> None:
        self.turns = Turns(len(self.clients), self.local_steps)

    def make(self, client: str, link: Link, job: Job, parts: HeadTail, timeout_s: float) -> RemoteTrunk:
        return TurnTrunk(link, job, timeout_s, self.turns, self.clients.index(client))
