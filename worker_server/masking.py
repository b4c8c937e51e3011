"""One try at a round's masked sum (shared/secure_aggregation): what comes, phase by phase, what goes back. No I/O.

    AdvertiseKeys* → KeyList → ShareKeys* → RelayedShares → MaskedInput* → UnmaskRequest → Unmask* → finish

Under a group's key (aggregation.group_key) the server takes off what masks it can, and one client opens the rest:

    ... Unmask* → uncover → GroupSum, to one → Sealed: the box of averages, for all. Or Unopened: then another is asked

worker_server/rounds.py says when a phase is closed: all members that are left have sent theirs. What it costs: a
vector that comes is added to the sum at once, on the socket thread, where opening its record took as long, so that no
vectors wait in memory. Removing the masks takes a key stream a client and belongs to the compute thread (`finish`).

Who objects to another's shares says that one of the two lies, or the server. The sum goes on without who objects, if
that leaves enough; else `ShareError` names those who are party to most objections, and the round begins without them.
"""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shared import flat
from shared.errors import AggregationError, PhaseError, SchemaError, ShareError, TensorError, TooFewLeft
from shared.flat import Shapes
from shared.job import Job
from shared.masked_updates import terms_of
from shared.payload.messages import Mask, Message, Objection, Sealed, SumOf, Unopened
from shared.sealed_averages import box_bytes
from shared.secure_aggregation.messages import (
    AdvertiseKeys,
    GroupSum,
    KeyList,
    MaskedInput,
    RelayedShares,
    RingKeys,
    RingRound,
    ShareKeys,
    Unmask,
    UnmaskRequest,
)
from shared.secure_aggregation.server import MaskedSum, Server
from shared.secure_aggregation.terms import Member, SumTerms, Terms
from shared.wire.envelope import Frame
from worker_server.box import Box
from worker_server.deadlines import Kind

NONCE_BYTES = 32
PHASES: tuple[tuple[type[Message], ...], ...] = (
    (AdvertiseKeys,),
    (ShareKeys,),
    (MaskedInput, Objection),
    (Unmask,),
    (Sealed, Unopened),
)
COLLECTING: tuple[Kind, ...] = ("keys", "shares", "input", "unmask", "open")
UNMASKING = 3
OPENING = 4

Next = KeyList | RelayedShares | UnmaskRequest | GroupSum | RingKeys | RingRound


@dataclass(frozen=True)
class Summed:
    """The weighted mean of what `contributors` changed, by name, float64; their total weight.

    `weights`: what each said that its own adapter is weighted by. `liars`: who gave shares that it was not dealt.
    `box`: under a group's key, in place of the change and the weight, which are nothing then.
    """

    delta: Mapping[str, Tensor]
    weight: int
    contributors: tuple[str, ...]
    weights: Mapping[str, int]
    liars: tuple[str, ...] = ()
    box: Box | None = None


def summed(made: MaskedSum, terms: SumTerms, shapes: Shapes, weights: Mapping[str, int]) -> Summed:
    """Raises AggregationError if masks are left."""
    mean, weight = made.mean(terms)
    contributors = tuple(terms.name(number) for number in made.contributors)
    return Summed(flat.part(torch.from_numpy(mean).double(), shapes), weight, contributors, weights, made.liars)


class RoundSum:
    """`round`: that of the updates. Under a group's key, `covered`: what is left for the group to open; `box`: what
    came of it; `asked`: who was asked to open it, and `unopened` who could not.
    """

    ends_with_late = False
    """Whether what comes late must stay sealed. Here a self-mask, of which nobody gives shares, is left on it."""

    def __init__(self, terms: Terms, nonce: str, shapes: Shapes, round: int) -> None:
        self.terms = terms
        self.round = round
        self.covered: MaskedSum | None = None
        self.box: Box | None = None
        self.asked: list[str] = []
        self.unopened: list[str] = []
        self._failure: AggregationError | None = None
        self.shapes = shapes
        self.announcement = SumOf(members=terms.members, nonce=nonce)
        self.phase = 0
        self.summed: tuple[str, ...] = ()
        self._server = Server(terms)
        self._numbers = {member.name: number for number, member in enumerate(terms.members)}
        self._objections: dict[str, str] = {}
        self._weights: dict[str, int] = {}

    @property
    def minimum(self) -> int:
        """With fewer members there is no sum."""
        return self.terms.threshold + 1

    @property
    def unmasking(self) -> bool:
        """Whether members were asked to help unmask: whoever has their answers sees the sum."""
        return self.phase >= UNMASKING

    @property
    def collecting(self) -> Kind:
        """What the members' messages of this phase are."""
        return COLLECTING[self.phase]

    @property
    def to_open(self) -> bool:
        """Whether a client is to open it now."""
        return self.covered is not None and self.box is None and self._failure is None

    def openers(self) -> set[str]:
        """Who could, and was not yet asked to."""
        assert self.covered is not None
        return {self.terms.name(number) for number in self.covered.contributors} - set(self.asked)

    def ask(self, client: str) -> tuple[GroupSum, Frame]:
        """What goes to the client that is to open it."""
        assert self.covered is not None
        self.asked.append(client)
        return self.covered.for_group(), self.covered.words.data

    def give_up(self) -> None:
        """Nobody is left to open it: `finish` says so."""
        named = ", ".join(self.unopened)
        why = f"it does not open under the group's key of {named}" if named else "all that could open it are gone"
        self._failure = AggregationError(f"the sum of round {self.round}: {why}")

    def take(self, client: str, message: Mask, frames: Iterable[Frame]) -> None:
        """Raises PeerError; nothing changes then."""
        body, number = message.body, self._numbers[client]
        if self.phase >= len(PHASES) or type(body) not in PHASES[self.phase]:
            raise PhaseError(f"{body.type}: out of turn")
        match body:
            case AdvertiseKeys():
                self._server.advertise_keys(number, body)
                self._weights[client] = message.weight
            case ShareKeys():
                self._server.share_keys(number, body)
            case MaskedInput():
                self._server.masked_input(number, body, next(iter(frames)))
            case Objection():
                self._object(client, body)
            case Unmask():
                self._server.unmask(number, body)
            case Sealed():
                self._seal(body, next(iter(frames)))
            case Unopened():
                self.unopened.append(client)

    def close(self, here: Collection[str]) -> dict[str, Next]:
        """The phase is over: what goes to whom, by name. Raises AggregationError; the phase is still open then.

        After the last there is nothing to send: `finish` is next. `here`: the members that are left; what came of
        others is used all the same.
        """
        answers: Mapping[int, Next]
        match self.phase:
            case 0:
                key_list = self._server.close_advertising()
                answers = {entry.client: key_list for entry in key_list.keys}
            case 1:
                answers = self._server.close_sharing()
            case 2:
                answers = self._close_inputs()
                self.summed = tuple(self.terms.name(number) for number in answers)
            case _:
                answers = {}
        self.phase += 1
        return {self.terms.name(number): body for number, body in answers.items()}

    def finish(self) -> Summed | None:
        """Removes the masks. Raises AggregationError, and it is over.

        None under a group's key the first time: one of the group is to open what is left (`to_open`), then it is there.
        """
        if self._failure is not None:
            raise self._failure
        made = self.covered or self._server.finish()
        if self.box is not None:
            contributors = tuple(self.terms.name(number) for number in made.contributors)
            return Summed({}, 0, contributors, self._weights, made.liars, self.box)
        if self.terms.group_key:
            self.covered = made
            return None
        return summed(made, self.terms, self.shapes, self._weights)

    def _seal(self, sealed: Sealed, frame: Frame) -> None:
        if sealed.round != self.round + 1:
            raise SchemaError(f"averages for round {sealed.round}; those for round {self.round + 1} are due")
        size, due = memoryview(frame).nbytes, box_bytes(self.terms.length)
        if size != due:
            raise TensorError(f"sealed averages have {due} bytes, not {size}")
        self.box = Box(sealed.round, bytes(frame))

    def _object(self, client: str, objection: Objection) -> None:
        if objection.client >= len(self.terms.members) or self.terms.name(objection.client) == client:
            raise SchemaError("an objection is to another member's shares")
        self._objections[client] = self.terms.name(objection.client)

    def _close_inputs(self) -> Mapping[int, UnmaskRequest]:
        try:
            return self._server.close_inputs()
        except TooFewLeft as error:
            if not self._objections:
                raise
            parties = Counter([*self._objections, *self._objections.values()])
            most = max(parties.values())
            named = tuple(sorted(name for name, count in parties.items() if count == most))
            raise ShareError(f"{', '.join(named)}: shares that do not open; {error.message}", clients=named) from None


class Sums:
    """Begins the sums of a job's rounds. `shapes`: of what each client hands in, by name."""

    def __init__(self, job: Job, shapes: Shapes, random: Callable[[int], bytes] = os.urandom) -> None:
        self.job = job
        self.shapes = shapes
        self.random = random

    def begin(self, round: int, members: Mapping[str, bytes], sessions: Mapping[str, bytes] | None = None) -> RoundSum:
        """Among these clients, by name with their public keys (32 bytes). Nothing is kept for their `sessions`."""
        roster = roster_of(members)
        nonce = self.random(NONCE_BYTES).hex()
        return RoundSum(terms_of(self.job, self.shapes, roster, round, nonce), nonce, self.shapes, round)


def roster_of(members: Mapping[str, bytes]) -> tuple[Member, ...]:
    return tuple(Member(name=name, public_key=public.hex()) for name, public in sorted(members.items()))
