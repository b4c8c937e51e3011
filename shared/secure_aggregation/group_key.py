"""A key among the clients, so that the server adds up what it cannot read: not even the sum.

    every member: hello → server → all: hellos → one member: deal → each member: join → GroupKey, for many rounds

The member that deals (any; the server picks one that is there) seals a random seed for each of the others, end to
end. In a sum every contributor adds the same mask G on top, the server gives back the masked sum with the number m of
those in it, and whoever has the key takes m G off.

m G alone would show something: if 2^j divides m, so do all its words, and the low j bits of the sum would be in the
clear. Hence the encoding keeps all data in multiples of 2^s with 2^s >= clients >= m (fixed_point.py): modulo 2^j
nothing of them is left, and data + m G is uniform over the multiples of 2^j whatever the data are.

One member that helps the server gives it the sum, and whoever joins a group can read its earlier sums if he has the
words: make a new group when members change. A dealer that gives different seeds to different members, or a server
that lies about m, spoils the sum and learns nothing.
"""

import os
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shared.errors import PhaseError, SchemaError, ShareError
from shared.identity import Identity
from shared.secure_aggregation import keys
from shared.secure_aggregation.checks import ascending, number_of
from shared.secure_aggregation.fixed_point import Floats, Words
from shared.secure_aggregation.masks import Mask, add_masks
from shared.secure_aggregation.messages import GroupHello, GroupHellos, GroupSeed, GroupSeeds, GroupSum
from shared.secure_aggregation.shamir import SECRET_BYTES, Random
from shared.secure_aggregation.terms import SumTerms


@dataclass(frozen=True)
class GroupKey:
    """What all members have, 32 bytes."""

    seed: bytes = field(repr=False)

    def mask(self, view: bytes) -> Mask:
        """What each contributor adds in the sum of this view (32 bytes; it must be another in every sum)."""
        return Mask(keys.derive(self.seed, "group mask", view))

    def open_sum(self, message: GroupSum, words: Words, terms: SumTerms, view: bytes) -> tuple[Floats, int]:
        """The mean, float32 (L,), and the total weight; `words` (L + 1,) change in place.

        Raises SchemaError for another number of words or more contributors than members, and AggregationError if the
        words are no such sum.
        """
        if message.contributors > len(terms.members) or not len(words) == message.words == terms.length + 1:
            raise SchemaError("a sum of more clients than there are, or of another length")
        add_masks(words, [Mask(self.mask(view).key, -message.contributors)])
        return terms.encoding.mean(words, message.contributors)


class GroupMember:
    """One client while a group is made. `terms`: for its members and label; other sums may use the group's key."""

    def __init__(self, terms: SumTerms, identity: Identity, *, random: Random = os.urandom) -> None:
        self._terms = terms
        self._static = identity.private
        self._random = random
        self._fresh = X25519PrivateKey.from_private_bytes(random(SECRET_BYTES))
        self._dealt = False
        self.number = number_of(terms, identity)

    def hello(self) -> GroupHello:
        return GroupHello(key=self._fresh.public_key().public_bytes_raw())

    def deal(self, message: GroupHellos) -> tuple[GroupKey, GroupSeeds]:
        """A new key, and its seed sealed for each of the others. Once. Raises SchemaError, PhaseError."""
        if self._dealt:
            raise PhaseError("this client has dealt a seed already")
        view = self._view(message)
        seed = self._random(SECRET_BYTES)
        seeds = tuple(
            GroupSeed(client=entry.client, box=keys.seal(self._box_key(message, view, self.number, entry.client), seed))
            for entry in message.keys
            if entry.client != self.number
        )
        self._dealt = True
        return GroupKey(seed), GroupSeeds(seeds=seeds)

    def join(self, message: GroupHellos, sealed: GroupSeed) -> GroupKey:
        """The key that the member `sealed.client` dealt. Raises SchemaError, or ShareError that names it."""
        view = self._view(message)
        if sealed.client == self.number or sealed.client not in {entry.client for entry in message.keys}:
            raise SchemaError("a seed from nobody else of the group")
        seed = keys.unseal(self._box_key(message, view, sealed.client, self.number), sealed.box)
        if seed is None:
            name = self._terms.name(sealed.client)
            raise ShareError(
                f"{name}: its sealed seed does not open: it, or the server, used other keys",
                clients=(name,),
                hint="compare the fingerprint of its card",
            )
        return GroupKey(seed)

    def _view(self, message: GroupHellos) -> bytes:
        ascending((entry.client for entry in message.keys), self._terms)
        mine = {entry.client: entry.key for entry in message.keys}.get(self.number)
        if mine != self._fresh.public_key().public_bytes_raw():
            raise SchemaError("the server's list of keys does not have this client's")
        return keys.view_of(self._terms.digest, ((entry.client, entry.key) for entry in message.keys))

    def _box_key(self, message: GroupHellos, view: bytes, sender: int, receiver: int) -> bytes:
        peer = sender if receiver == self.number else receiver
        fresh = next(entry.key for entry in message.keys if entry.client == peer)
        secret = keys.pair_secret(self._fresh, self._static, fresh, self._terms.members[peer].public)
        return keys.derive(secret, "group seed", view, sender, receiver)
