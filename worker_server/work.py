"""What the state machines tell the rest of the server to do, as plain data."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from shared.payload.messages import SumOf
from shared.wire.envelope import Frame
from worker_server.masking import Next
from worker_server.ring import AnySum


@dataclass(frozen=True)
class Ticket:
    """One client's request: what the state machine must know, and a payload that it carries unread.

    `weight` is the number of target tokens (Forward) or what the average is weighted by (Update); for Backward,
    `forward` is the request whose gradient this is; for Generate, `stream` is what its rows continue. `refused`: why an
    Update does not count; its sender is as much a member as before. `held`: the round whose start an Update's (or a
    Mask's) sender still has. `public`: the client's public key, 32 bytes.
    """

    session: bytes
    client: str
    request: int
    payload: Any = field(repr=False, compare=False)
    tokens: int = 0
    weight: int = 0
    forward: int = 0
    stream: int = 0
    refused: str | None = None
    held: int | None = None
    public: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class RunForward:
    """One packed training forward; keep what its backward needs under the number `cohort`."""

    cohort: int
    tickets: tuple[Ticket, ...]


@dataclass(frozen=True)
class RunBackward:
    """One backward for those of the cohort's `forwards` whose gradients, by session, are here.

    `steps`: how far the schedule moves in the optimizer step that follows; None: no step follows yet. `last`: no more
    gradients are to come for this cohort.
    """

    cohort: int
    forwards: tuple[Ticket, ...]
    gradients: dict[bytes, Ticket]
    steps: float | None = 1.0
    last: bool = True


@dataclass(frozen=True)
class RunEvaluation:
    tickets: tuple[Ticket, ...]


@dataclass(frozen=True)
class RunGeneration:
    """Rows that go on from the tokens before them, of many streams in one forward."""

    tickets: tuple[Ticket, ...]


@dataclass(frozen=True)
class ReleaseStreams:
    """Forget what was kept for these streams, by session and number."""

    streams: tuple[tuple[bytes, int], ...]


@dataclass(frozen=True)
class Aggregate:
    """Average the updates of `round` (from 0), then keep a checkpoint of `round + 1` completed rounds.

    `clients`: those from whom the next round is drawn, where it is; a resumed server draws from them. `sum`: where
    updates are masked, what they were added to.
    """

    round: int
    updates: tuple[Ticket, ...]
    clients: tuple[str, ...] = ()
    sum: AnySum | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Dismiss:
    """End these sessions: their round is undone, or they are `late` and it goes on without them. The clients come back
    and begin it anew, or the next.
    """

    sessions: tuple[bytes, ...]
    late: bool = False


@dataclass(frozen=True)
class Restore:
    """Go back to the state at the beginning of `round`."""

    round: int


@dataclass(frozen=True)
class StartRound:
    """Answer these Join, Update or last Mask requests: the round begins. `sum`: where its updates are masked."""

    round: int
    answers: tuple[Ticket, ...]
    sum: SumOf | None = None


@dataclass(frozen=True)
class Relay:
    """Answer these Mask requests: the next phase of the masked sum begins. `frames`: what follows each answer."""

    answers: tuple[tuple[Ticket, Next], ...]
    frames: tuple[Frame, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Bind:
    """Keep on disk, before anything else is sent: the sum of `round` is one of these clients, and of no others."""

    round: int
    clients: tuple[str, ...]


@dataclass(frozen=True)
class SumFailed:
    """Say that the masked sum of `round` came to nothing, and who is kept out for it."""

    round: int
    reason: str
    barred: tuple[str, ...]


@dataclass(frozen=True)
class Finish:
    answers: tuple[Ticket, ...]


@dataclass(frozen=True)
class Refuse:
    session: bytes
    request: int
    code: str
    message: str


Work = RunForward | RunBackward | RunEvaluation | RunGeneration | ReleaseStreams | Aggregate | Restore
Instruction = Work | StartRound | Relay | Bind | SumFailed | Finish | Refuse | Dismiss


def in_order(tickets: Iterable[Ticket]) -> tuple[Ticket, ...]:
    """The fixed order of a cohort, by client name: the same sum in the same order, whoever was faster."""
    return tuple(sorted(tickets, key=lambda ticket: (ticket.client, ticket.request)))


def refuse(ticket: Ticket, code: str, message: str) -> Refuse:
    return Refuse(ticket.session, ticket.request, code, message)
