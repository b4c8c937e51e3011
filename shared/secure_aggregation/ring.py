"""A ring for groups that hardly change: two shared secrets a client, one message a round, whatever the group's size.

After ACCESS-FL (arXiv 2409.01722) and CESA (arXiv 2405.01144): each client shares a secret with the client before and
the one after it on a circle, and masks with the two, without self-masks and secret sharing:

    y_u = x_u + PRG(s_u,next) - PRG(s_previous,u)      modulo 2^bits

Keys are advertised once for as long as the group stays; a mask's key follows from the pair's secret, the number of
the sum and its members. If a member is missing, the sum comes to nothing (TooFewLeft) and is done again, under another
number, without it. No secret is ever given out; but if the input of one that was late is opened after all, the two sums
differ by it. So who calls must see to it that what comes late is never read (docs/adr/0024-a-ring-in-the-rounds.md).

**Honest-but-curious only, and less than SecAgg promises.** The two neighbours of a client, together with the server,
can unmask it: they know both its masks. A server that lies about who is there gets the same update summed among
different members, and the difference of two such sums is an update. The order on the circle follows from all advertised
keys, so nobody picks neighbours outright; a server that leaves members out moves them. Where that is too little, use
client.py and server.py.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shared.errors import PhaseError, SchemaError, TensorError, TooFewLeft
from shared.identity import Identity
from shared.secure_aggregation import graph, keys
from shared.secure_aggregation.checks import ascending, number_of, words_of
from shared.secure_aggregation.fixed_point import Floats, Words
from shared.secure_aggregation.group_key import GroupKey
from shared.secure_aggregation.masks import Mask, add_masks
from shared.secure_aggregation.messages import GroupSum, PublicKey, RingInput, RingKey, RingKeys, RingRound
from shared.secure_aggregation.server import MaskedSum
from shared.secure_aggregation.shamir import SECRET_BYTES, Random
from shared.secure_aggregation.terms import RingTerms
from shared.wire.envelope import Frame


class RingMember:
    """One client of a ring: `advertise_key`, `connect`, then `mask_input` for each sum.

    `identity`: the key of the card that the terms' members name, else SchemaError. `group` is due if they say
    `group_key`.
    """

    def __init__(
        self, terms: RingTerms, identity: Identity, *, group: GroupKey | None = None, random: Random = os.urandom
    ) -> None:
        self.number = number_of(terms, identity)
        if terms.group_key != (group is not None):
            raise SchemaError("a group's key is due exactly if the terms say group_key")
        self._terms = terms
        self._static = identity.private
        self._group = group
        self._fresh = X25519PrivateKey.from_private_bytes(random(SECRET_BYTES))
        self._keys: Mapping[int, bytes] | None = None
        self._view = b""
        self._secrets: dict[int, bytes] = {}
        self._next_sequence = 0

    def advertise_key(self) -> RingKey:
        return RingKey(key=self._fresh.public_key().public_bytes_raw())

    def connect(self, message: RingKeys) -> None:
        """The ring's members and keys, once. Raises PhaseError, SchemaError, and TooFewLeft below the minimum."""
        if self._keys is not None:
            raise PhaseError("this client is in the ring already")
        advertised = ascending((entry.client for entry in message.keys), self._terms)
        by_number = {entry.client: entry.key for entry in message.keys}
        if by_number.get(self.number) != self._fresh.public_key().public_bytes_raw():
            raise SchemaError("the server's list of keys does not have this client's")
        _enough(len(advertised), self._terms)
        self._keys, self._view = by_number, keys.view_of(self._terms.digest, by_number.items())

    def mask_input(self, message: RingRound, values: Floats, weight: int) -> tuple[RingInput, Words]:
        """The update, float32 (L,), times its weight, masked: words (L + 1,), the frame to send.

        Raises PhaseError before `connect` and for a number that was used; SchemaError for members that are not of
        the ring, or are without this client; TooFewLeft below the minimum; TensorError as `FixedPoint.encode`.
        """
        if self._keys is None:
            raise PhaseError("this client is in no ring yet")
        if message.sequence < self._next_sequence:
            raise PhaseError(f"sum {message.sequence} was masked before; {self._next_sequence} is the next")
        members = ascending(message.members, self._terms)
        if self.number not in members or not set(members) <= self._keys.keys():
            raise SchemaError("a sum among members of the ring, this client one of them, is due")
        _enough(len(members), self._terms)
        if len(values) != self._terms.length:
            raise TensorError(f"an update of {len(values)} values; the terms say {self._terms.length}")
        words = self._terms.encoding.encode(values, weight)
        view = sum_view(self._view, message)
        order = graph.shuffled(self._view, members)
        place = order.index(self.number)
        masks = [
            Mask(self._mask_key(self._keys, view, order[(place + 1) % len(order)], forward=True), 1),
            Mask(self._mask_key(self._keys, view, order[place - 1], forward=False), -1),
        ]
        if self._group is not None:
            masks.append(self._group.mask(view))
        add_masks(words, masks)
        self._next_sequence = message.sequence + 1
        return RingInput(sequence=message.sequence, words=len(words)), words

    def open_sum(self, asked: RingRound, message: GroupSum, words: Words) -> tuple[Floats, int]:
        """Under a group key: the weighted mean, float32 (L,), and the total weight. `words` (L + 1,) change in place.

        Raises PhaseError without a group's key, and AggregationError if it is not the sum that was asked for.
        """
        if self._group is None:
            raise PhaseError("a sum under a group's key, but the terms say that there is none")
        return self._group.open_sum(message, words, self._terms, sum_view(self._view, asked))

    def _mask_key(self, advertised: Mapping[int, bytes], view: bytes, peer: int, *, forward: bool) -> bytes:
        if peer not in self._secrets:
            static = self._terms.members[peer].public
            self._secrets[peer] = keys.pair_secret(self._fresh, self._static, advertised[peer], static)
        ends = (self.number, peer) if forward else (peer, self.number)
        return keys.derive(self._secrets[peer], "ring mask", view, *ends)


class RingServer:
    """Adds up a ring's inputs: `advertise_key`*, `close_advertising`; a sum is `start`, `masked_input`*, `finish`."""

    def __init__(self, terms: RingTerms) -> None:
        self._terms = terms
        self._keys: dict[int, bytes] = {}
        self._connected = False
        self._round: RingRound | None = None
        self._sequence = 0
        self._there: set[int] = set()
        self._sum = np.zeros(0, terms.encoding.dtype)

    def advertise_key(self, client: int, message: RingKey) -> None:
        """Raises PhaseError if repeated or late, and SchemaError for a key of low order."""
        if self._connected or client in self._keys or not 0 <= client < len(self._terms.members):
            raise PhaseError(f"client {client}: its key is there, or the ring is closed")
        keys.agree(X25519PrivateKey.generate(), message.key)
        self._keys[client] = message.key

    def close_advertising(self) -> RingKeys:
        """What goes to all who advertised a key. Raises PhaseError and TooFewLeft."""
        if self._connected:
            raise PhaseError("the ring is closed already")
        _enough(len(self._keys), self._terms)
        self._connected = True
        return RingKeys(keys=tuple(PublicKey(client=client, key=self._keys[client]) for client in sorted(self._keys)))

    def start(self, members: Iterable[int]) -> RingRound:
        """A sum among these members of the ring; one that is under way is dropped. Raises PhaseError, TooFewLeft."""
        chosen = tuple(sorted(set(members)))
        if not self._connected or not set(chosen) <= self._keys.keys():
            raise PhaseError("the ring is not closed yet, or has not all of these members")
        _enough(len(chosen), self._terms)
        self._round = RingRound(sequence=self._sequence, members=chosen)
        self._sequence += 1
        self._there = set()
        self._sum = np.zeros(self._terms.length + 1, self._terms.encoding.dtype)
        return self._round

    def masked_input(self, client: int, message: RingInput, frame: Frame) -> None:
        """Adds the client's words. Raises PhaseError (another sum's, repeated, no member), SchemaError, TensorError."""
        if self._round is None or message.sequence != self._round.sequence:
            raise PhaseError(f"sum {message.sequence} is not under way")
        if client not in self._round.members or client in self._there:
            raise PhaseError(f"client {client} has no part in this sum, or has sent this already")
        words = words_of(frame, self._terms.encoding, self._terms.length)
        if message.words != len(words):
            raise SchemaError(f"{message.words} words announced, {len(words)} came")
        self._sum += words
        self._there.add(client)

    @property
    def waiting_for(self) -> tuple[int, ...]:
        """Whose input is missing."""
        return () if self._round is None else tuple(sorted(set(self._round.members) - self._there))

    def finish(self) -> MaskedSum:
        """The sum. Raises PhaseError if none is under way; TooFewLeft if a member is missing: `start` one without."""
        if self._round is None:
            raise PhaseError("no sum is under way")
        if self.waiting_for:
            names = tuple(self._terms.name(client) for client in self.waiting_for)
            raise TooFewLeft(
                f"{len(names)} of {len(self._round.members)} members are missing, and a ring needs all",
                clients=names,
                hint="do the sum again among those that are there",
            )
        done, self._round = self._round, None
        return MaskedSum(self._sum, done.members)


def sum_view(view: bytes, message: RingRound) -> bytes:
    """SHA-256 over the ring, the number of the sum and its members, 32 bytes."""
    numbers = b"".join(number.to_bytes(8) for number in (message.sequence, *message.members))
    return hashlib.sha256(view + numbers).digest()


def _enough(clients: int, terms: RingTerms) -> None:
    if clients < terms.minimum:
        raise TooFewLeft(f"{clients} members of the ring, {terms.minimum} are due (minimum)")
