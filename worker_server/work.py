"""What the state machines tell the rest of the server to do, as plain data."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ticket:
    """One client's request: what the state machine must know, and a payload that it carries unread.

    `weight` is the number of target tokens (Forward) or what the average is weighted by (Update); for Backward,
    `forward` is the request whose gradient this is; for Generate, `stream` is what its rows continue. `refused`: why an
    Update does not count; its sender is as much a member as before. `held`: the round whose start an Update's sender
    still has.
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
    """Average the updates of `round` (from 0), then keep a checkpoint of `round + 1` completed rounds."""

    round: int
    updates: tuple[Ticket, ...]


@dataclass(frozen=True)
class Dismiss:
    """End these sessions: their round is undone. The clients come back and begin it anew."""

    sessions: tuple[bytes, ...]


@dataclass(frozen=True)
class Restore:
    """Go back to the state at the beginning of `round`."""

    round: int


@dataclass(frozen=True)
class StartRound:
    """Answer these Join or Update requests: the round begins."""

    round: int
    answers: tuple[Ticket, ...]


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
Instruction = Work | StartRound | Finish | Refuse | Dismiss


def in_order(tickets: Iterable[Ticket]) -> tuple[Ticket, ...]:
    """The fixed order of a cohort, by client name: the same sum in the same order, whoever was faster."""
    return tuple(sorted(tickets, key=lambda ticket: (ticket.client, ticket.request)))


def refuse(ticket: Ticket, code: str, message: str) -> Refuse:
    return Refuse(ticket.session, ticket.request, code, message)
