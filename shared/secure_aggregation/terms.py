"""What all clients of a sum agree on before it: never taken from the server alone, and bound into every key."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Self

from pydantic import Field, model_validator

from shared.identity import Card
from shared.payload.schema import Hex, Message
from shared.secure_aggregation.fixed_point import FixedPoint
from shared.wire.envelope import Name

MIN_CLIENTS = 3
MAX_CLIENTS = 10_000
# One frame holds a masked vector of 64-bit words and its weight.
MAX_LENGTH = 2**27 - 1
MAX_WEIGHT = 2**28


class Member(Message):
    """A client's name and the X25519 public key of its card."""

    name: Name
    public_key: Hex

    @property
    def public(self) -> bytes:
        """32 bytes."""
        return bytes.fromhex(self.public_key)


def roster(cards: Sequence[Card]) -> tuple[Member, ...]:
    """The members that these cards describe, by name. A client's number is its place among them, from 0."""
    members = (Member(name=card.name, public_key=card.public_key) for card in cards)
    return tuple(sorted(members, key=lambda member: member.name))


class SumTerms(Message):
    """Of what, and among whom.

    `label`: 32 bytes in hexadecimal that no other sum of these clients has, such as a digest of job, round and attempt.
    `length`: values of an update. `clip`: what is larger in magnitude is clipped to it. `max_weight`: a client's weight
    is at most this. `largest_error`: by how much a value of the weighted mean may differ from that of the clipped
    updates before it is rounded to float32; the size of a word on the wire follows from it. `group_key`: the clients
    keep the sum from the server.
    """

    label: Hex
    members: Annotated[tuple[Member, ...], Field(min_length=MIN_CLIENTS, max_length=MAX_CLIENTS)]
    length: Annotated[int, Field(ge=1, le=MAX_LENGTH)]
    clip: Annotated[float, Field(ge=1e-30, le=1e30)]
    max_weight: Annotated[int, Field(ge=1, le=MAX_WEIGHT)]
    largest_error: Annotated[float, Field(gt=0)]
    group_key: bool = False

    @model_validator(mode="after")
    def _members_are_told_apart(self) -> Self:
        names = [member.name for member in self.members]
        if names != sorted(set(names)):
            raise ValueError("members: sorted by name, each once")
        if len({member.public_key for member in self.members}) != len(self.members):
            raise ValueError("members: two have the same public key")
        return self

    @model_validator(mode="after")
    def _can_be_encoded(self) -> Self:
        _ = self.encoding
        return self

    @cached_property
    def encoding(self) -> FixedPoint:
        return FixedPoint.choose(
            clip=self.clip,
            max_weight=self.max_weight,
            clients=len(self.members),
            largest_error=self.largest_error,
            group_key=self.group_key,
        )

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over all of it, 32 bytes."""
        kind = type(self).__name__.encode()
        return hashlib.sha256(kind + b"\0" + self.model_dump_json().encode()).digest()

    def name(self, client: int) -> str:
        return self.members[client].name


class Terms(SumTerms):
    """Of a sum by SecAgg or SecAgg+.

    `neighbours`: with how many others each client shares masks and secrets; all others (SecAgg), or an even number
    (SecAgg+; `graph.choose` computes how many). `threshold`: how many of its neighbours must help to remove a client's
    mask. It is more than half of them, so that a server that tells the clients different stories about who dropped
    out does not get both kinds of shares of one client, unless `2 * threshold - neighbours` neighbours help it.
    """

    neighbours: Annotated[int, Field(ge=2, lt=MAX_CLIENTS)]
    threshold: Annotated[int, Field(ge=2, lt=MAX_CLIENTS)]

    @model_validator(mode="after")
    def _threshold_fits(self) -> Self:
        others = len(self.members) - 1
        if self.neighbours > others:
            raise ValueError(f"neighbours: there are only {others} others")
        if self.neighbours < others and self.neighbours % 2:
            raise ValueError("neighbours: an even number, or all others")
        if not self.neighbours < 2 * self.threshold <= 2 * self.neighbours:
            raise ValueError("threshold: more than half of the neighbours, and not more than there are")
        return self


class RingTerms(SumTerms):
    """Of the sums of a ring. `minimum`: how few members a sum may have (with two, each could be told from the sum)."""

    minimum: Annotated[int, Field(ge=MIN_CLIENTS, le=MAX_CLIENTS)] = MIN_CLIENTS

    @model_validator(mode="after")
    def _minimum_fits(self) -> Self:
        if self.minimum > len(self.members):
            raise ValueError(f"minimum: there are only {len(self.members)} members")
        return self
