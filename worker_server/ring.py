"""One try at a round's sum among the members of a ring, and the ring that stays from round to round. No I/O.

    RingKey* → RingKeys, where the ring is to be made; then RingInput* → finish

As worker_server/masking.py for SecAgg, after ACCESS-FL (arXiv 2409.01722) and CESA (arXiv 2405.01144); shared/
secure_aggregation/ring.py has the scheme. A member's keys live as long as its session. So the ring serves a round whose
members all are in it with the sessions they had when it was made; where one is new, or came back, it is made anew.

If members are lost before their input came, the sum comes to nothing. When all that are left have sent theirs, they are
asked again, under another number, among themselves (`RingRound`). The two sums must never both be seen: they differ by
the updates of the lost. So the sessions of the lost are over by then, also of those that are only late, and with their
keys gone what comes in them is never opened (`ends_with_late`).
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from shared.errors import PhaseError
from shared.flat import Shapes
from shared.job import Job
from shared.masked_updates import ring_terms_of
from shared.payload.messages import Mask, SumOf
from shared.secure_aggregation.messages import RingInput, RingKey
from shared.secure_aggregation.ring import RingServer
from shared.secure_aggregation.terms import RingTerms
from shared.wire.envelope import Frame
from worker_server.deadlines import Kind
from worker_server.masking import NONCE_BYTES, Next, RoundSum, Summed, Sums, roster_of, summed


@dataclass
class Ring:
    """`sessions`: of those whose keys are in it, by name; empty until it is made."""

    terms: RingTerms
    nonce: str
    server: RingServer
    sessions: Mapping[str, bytes] = field(default_factory=dict)

    def serves(self, sessions: Mapping[str, bytes]) -> bool:
        return sessions.items() <= self.sessions.items()


class RingSum:
    ends_with_late = True
    """Whether what comes late must stay sealed: with the sum that was done again it would give an update away."""

    def __init__(self, ring: Ring, shapes: Shapes, sessions: Mapping[str, bytes]) -> None:
        self.terms = ring.terms
        self.shapes = shapes
        self.phase = 0
        self.summed: tuple[str, ...] = ()
        self._ring = ring
        self._sessions = sessions
        self._numbers = {member.name: number for number, member in enumerate(ring.terms.members)}
        self._weights: dict[str, int] = {}
        self._asked = ring.server.start(self._numbers[name] for name in sessions) if ring.sessions else None
        self.announcement = SumOf(members=ring.terms.members, nonce=ring.nonce, ring=self._asked)

    @property
    def minimum(self) -> int:
        """With fewer members there is no sum."""
        return self.terms.minimum

    @property
    def unmasking(self) -> bool:
        """Whether the sum is there to be seen: all inputs have come."""
        return bool(self.summed)

    @property
    def collecting(self) -> Kind:
        """What the members' messages of this phase are. Local training comes before the first."""
        if not self._ring.sessions:
            return "keys"
        return "update" if self.phase == 0 else "input"

    def take(self, client: str, message: Mask, frames: Iterable[Frame]) -> None:
        """Raises PeerError; nothing changes then."""
        body, number, server = message.body, self._numbers[client], self._ring.server
        match body:
            case RingKey() if not self._ring.sessions:
                server.advertise_key(number, body)
            case RingInput() if self._ring.sessions:
                server.masked_input(number, body, next(iter(frames)))
                self._weights[client] = message.weight
            case _:
                raise PhaseError(f"{body.type}: out of turn")

    def close(self, here: Collection[str]) -> dict[str, Next]:
        """All members that are left (`here`) have sent theirs: what goes to whom, by name. Raises AggregationError.

        With nothing to send the sum is there: `finish` is next.
        """
        ring = self._ring
        answers: dict[str, Next] = {}
        if not ring.sessions:
            ring_keys = ring.server.close_advertising()
            names = [self.terms.name(entry.client) for entry in ring_keys.keys]
            self._asked = ring.server.start(entry.client for entry in ring_keys.keys)
            ring.sessions = {name: self._sessions[name] for name in names}
            answers = dict.fromkeys(names, ring_keys)
        elif ring.server.waiting_for:
            self._asked = ring.server.start(self._numbers[name] for name in here)
            answers = dict.fromkeys(here, self._asked)
        else:
            assert self._asked is not None
            self.summed = tuple(self.terms.name(number) for number in self._asked.members)
        self.phase += 1
        return answers

    def finish(self) -> Summed:
        """Raises AggregationError, and it is over."""
        return summed(self._ring.server.finish(), self.terms, self.shapes, self._weights)


class Rings:
    """Begins the sums of a job's rounds, as `Sums`, with the ring that there is where it serves."""

    def __init__(self, job: Job, shapes: Shapes, random: Callable[[int], bytes] = os.urandom) -> None:
        self.job = job
        self.shapes = shapes
        self.random = random
        self.ring: Ring | None = None

    def begin(self, round: int, members: Mapping[str, bytes], sessions: Mapping[str, bytes]) -> RingSum:
        """Among these clients, by name with their public keys (32 bytes) and their sessions."""
        if self.ring is None or not self.ring.serves(sessions):
            nonce = self.random(NONCE_BYTES).hex()
            terms = ring_terms_of(self.job, self.shapes, roster_of(members), nonce)
            self.ring = Ring(terms, nonce, RingServer(terms))
        return RingSum(self.ring, self.shapes, sessions)


AnySum = RoundSum | RingSum
AnySums = Sums | Rings
