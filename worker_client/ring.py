"""A client's place in the ring of its session: keys are agreed once, then its update is one request a round.

A sum that lost members comes to nothing, and the server asks those that are left again, under another number, with
other masks, for the same update. It is asked among fewer each time, never among others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shared.errors import SchemaError
from shared.identity import Identity
from shared.secure_aggregation.fixed_point import Floats
from shared.secure_aggregation.messages import RingKeys, RingRound
from shared.secure_aggregation.ring import RingMember
from shared.secure_aggregation.terms import RingTerms
from worker_client.remote_trunk import Boundary, RemoteTrunk


@dataclass
class RingPlace:
    """`asked`: the sum to take part in; None while the ring is to be made."""

    terms: RingTerms
    nonce: str
    identity: Identity
    asked: RingRound | None = None
    member: RingMember = field(init=False)

    def __post_init__(self) -> None:
        self.member = RingMember(self.terms, self.identity)

    def hand_in(
        self,
        trunk: RemoteTrunk,
        round: int,
        told: int,
        update: tuple[Floats, int],
        check: Callable[[Sequence[str]], None],
    ) -> Boundary:
        """The update of `round` and its weight, masked; what the server says when the sum is there.

        `check` raises Refused for members whose sum it must not be; `told`: the weight of this client's own adapter in
        the trunk. Raises what the library raises for a server that breaks the protocol.
        """
        if self.asked is None:
            keys = trunk.mask(round, self.member.advertise_key(), RingKeys)
            if isinstance(keys, Boundary):
                raise SchemaError("the server ended the round before there was a sum")
            self.member.connect(keys)
            self.asked = RingRound(sequence=0, members=tuple(entry.client for entry in keys.keys))
        while True:
            message, words = self.member.mask_input(self.asked, *update)
            check(self.summed())
            answer = trunk.mask(round, message, RingRound, [words.data], weight=told)
            if isinstance(answer, Boundary):
                return answer
            if not set(answer.members) < set(self.asked.members):
                raise SchemaError("the server would do a sum again among others than fewer of the same")
            self.asked = answer

    def summed(self) -> list[str]:
        """Whose sum this client was asked for last."""
        return [] if self.asked is None else [self.terms.name(number) for number in self.asked.members]
