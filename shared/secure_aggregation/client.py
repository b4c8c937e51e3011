"""A client's side of SecAgg (Bonawitz et al., CCS 2017) and SecAgg+ (Bell et al., CCS 2020), without I/O.

    advertise_keys → share_keys → mask_input → unmask

Each method takes the server's message and gives the answer; in any other order it raises PhaseError. Whatever it raises
changes nothing: the client waits for the right message. An object serves one sum and masks one vector.

The masks (figure 4 of the first paper, semi-honest variant with double masking; x the encoded update):

    y_u = x_u + PRG(b_u) + sum over neighbours v of ( PRG(s_uv) if u < v else -PRG(s_uv) )      modulo 2^bits

The server is told shares of b_u if u's input came, and of u's masking key if it did not. A client gives one kind for
one client and answers once. There is no consistency round: against a server that tells clients different stories about
who dropped out, docs/adr/0012-secure-aggregation.md says what is left.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shared.errors import PhaseError, SchemaError, ShareError, TensorError, TooFewLeft
from shared.identity import Identity
from shared.secure_aggregation import graph, keys, shamir
from shared.secure_aggregation.checks import ascending, number_of
from shared.secure_aggregation.fixed_point import Floats, Words
from shared.secure_aggregation.group_key import GroupKey
from shared.secure_aggregation.masks import Mask, add_masks
from shared.secure_aggregation.messages import (
    AdvertiseKeys,
    ClientKeys,
    GroupSum,
    KeyList,
    MaskedInput,
    RelayedShares,
    SealedShares,
    Share,
    ShareKeys,
    Unmask,
    UnmaskRequest,
)
from shared.secure_aggregation.shamir import SECRET_BYTES, SHARE_BYTES, Random
from shared.secure_aggregation.terms import Terms


class Phase(Enum):
    """What the client has done."""

    NOTHING = "nothing"
    ADVERTISED = "advertised its keys"
    SHARED = "shared its keys"
    MASKED = "masked its input"
    UNMASKED = "helped to unmask"


@dataclass(frozen=True)
class _Held:
    """A neighbour's two shares, 33 bytes each."""

    self_share: bytes = field(repr=False)
    key_share: bytes = field(repr=False)


@dataclass(frozen=True)
class View:
    """What is known once keys were advertised: all of them, this client's neighbours, and the digest of it all."""

    digest: bytes
    keys: Mapping[int, ClientKeys]
    neighbours: list[int]


class Client:
    """One client in one sum. `identity`: the key of the card that the terms' members name.

    Raises SchemaError if the terms do not name this identity; `group` is due if they say `group_key`.
    """

    def __init__(
        self, terms: Terms, identity: Identity, *, group: GroupKey | None = None, random: Random = os.urandom
    ) -> None:
        self.number = number_of(terms, identity)
        if terms.group_key != (group is not None):
            raise SchemaError("a group's key is due exactly if the terms say group_key")
        self._terms = terms
        self._static = identity.private
        self._group = group
        self._random = random
        self._phase = Phase.NOTHING
        self._sealing = X25519PrivateKey.from_private_bytes(random(SECRET_BYTES))
        self._masking = X25519PrivateKey.from_private_bytes(random(SECRET_BYTES))
        self._seed = random(SECRET_BYTES)
        self._view = View(b"", {}, [])
        self._held: dict[int, _Held] = {}

    def advertise_keys(self) -> AdvertiseKeys:
        self._expect(Phase.NOTHING)
        self._phase = Phase.ADVERTISED
        return AdvertiseKeys(
            sealing=self._sealing.public_key().public_bytes_raw(),
            masking=self._masking.public_key().public_bytes_raw(),
        )

    def share_keys(self, message: KeyList) -> ShareKeys:
        """Shares of both secrets, sealed for each neighbour of the graph that follows from all keys.

        Raises SchemaError if the list is not in order or has other keys of ours, and TooFewLeft.
        """
        self._expect(Phase.ADVERTISED)
        view = self._seen(message)
        points = [holder + 1 for holder in view.neighbours]
        threshold = self._terms.threshold
        self_shares = shamir.split(self._seed, threshold, points, self._random)
        key_shares = shamir.split(self._masking.private_bytes_raw(), threshold, points, self._random)
        shares = tuple(
            self._sealed(view, holder, self_shares[holder + 1], key_shares[holder + 1]) for holder in view.neighbours
        )
        self._view, self._phase = view, Phase.SHARED
        return ShareKeys(
            seed_commitment=keys.commitment(self._seed, "seed", view.digest, self.number),
            shares=shares,
        )

    def mask_input(self, message: RelayedShares, values: Floats, weight: int) -> tuple[MaskedInput, Words]:
        """The update, float32 (L,), multiplied by its weight and masked: words (L + 1,), the frame to send.

        Memory: the words, and less than 4 MiB. Raises ShareError that names whose shares do not open or do not fit
        what it committed to (the client then leaves the round), SchemaError for shares of others than neighbours,
        TooFewLeft for fewer of them than the threshold, and TensorError for an update of another length, or as
        `FixedPoint.encode` does.
        """
        self._expect(Phase.SHARED)
        held = self._opened(message)
        if len(values) != self._terms.length:
            raise TensorError(f"an update of {len(values)} values; the terms say {self._terms.length}")
        words = self._terms.encoding.encode(values, weight)
        masks = [Mask(keys.derive(self._seed, "self mask", self._view.digest, self.number))]
        for peer in held:
            secret = keys.agree(self._masking, self._view.keys[peer].masking)
            masks.append(pair_mask(secret, self._view.digest, self.number, peer))
        if self._group is not None:
            masks.append(self._group.mask(self._view.digest))
        add_masks(words, masks)
        self._held, self._phase = held, Phase.MASKED
        return MaskedInput(words=len(words)), words

    def in_sum(self, message: UnmaskRequest) -> tuple[int, ...]:
        """Who is in the sum, ascending, as the server says; of its neighbours this client knows it.

        Raises SchemaError if the request leaves out this client, names one that advertised no keys, one in both lists,
        or a neighbour in neither whose shares this client holds, or in either without them; TooFewLeft if fewer inputs
        of neighbours are in the sum than the threshold.
        """
        self._expect(Phase.MASKED)
        summed, dropped = ascending(message.summed, self._terms), ascending(message.dropped, self._terms)
        if self.number not in summed or not self._view.keys.keys() >= {*summed}:
            raise SchemaError("a sum without this client, or of clients that advertised no keys")
        if set(summed) & set(dropped):
            raise SchemaError("both kinds of shares of one client: never")
        near = set(summed) & set(self._view.neighbours)
        if near | set(dropped) != self._held.keys():
            raise SchemaError("shares of exactly the clients whose shares are held are given out")
        if len(near) < self._terms.threshold:
            raise TooFewLeft(f"{len(near)} neighbours' inputs in the sum, {self._terms.threshold} are due (threshold)")
        return summed

    def unmask(self, message: UnmaskRequest) -> Unmask:
        """One share of each neighbour, of the kind the server needs. Answers once. Raises as `in_sum` does."""
        summed = set(self.in_sum(message))
        answer = Unmask(
            self_shares=tuple(Share(client=u, share=h.self_share) for u, h in self._held.items() if u in summed),
            key_shares=tuple(Share(client=u, share=self._held[u].key_share) for u in message.dropped),
        )
        self._held, self._seed, self._phase = {}, b"", Phase.UNMASKED
        return answer

    def open_sum(self, message: GroupSum, words: Words) -> tuple[Floats, int]:
        """Under a group key: the weighted mean, float32 (L,), and the total weight. `words` (L + 1,) change in place.

        Raises AggregationError if no sum of so many clients of the group, in this round, is in it.
        """
        self._expect(Phase.UNMASKED)
        if self._group is None:
            raise PhaseError("a sum under a group's key, but the terms say that there is none")
        return self._group.open_sum(message, words, self._terms, self._view.digest)

    def _expect(self, phase: Phase) -> None:
        if self._phase is not phase:
            raise PhaseError(f"out of turn: this client has {self._phase.value}; it should have {phase.value}")

    def _seen(self, message: KeyList) -> View:
        advertised = ascending((entry.client for entry in message.keys), self._terms)
        by_number = {entry.client: entry for entry in message.keys}
        mine = by_number.get(self.number)
        if (
            mine is None
            or mine.sealing != self._sealing.public_key().public_bytes_raw()
            or mine.masking != self._masking.public_key().public_bytes_raw()
        ):
            raise SchemaError("the server's list of keys does not have this client's")
        if len(advertised) <= self._terms.threshold:
            raise TooFewLeft(
                f"{len(advertised)} clients advertised keys, {self._terms.threshold + 1} are due (threshold)"
            )
        digest = keys_digest(self._terms, message)
        order = graph.shuffled(digest, advertised)
        neighbours = graph.neighbours_at(order, order.index(self.number), self._terms.neighbours)
        return View(digest, by_number, neighbours)

    def _box_key(self, view: View, sender: int, receiver: int) -> bytes:
        peer = sender if receiver == self.number else receiver
        static = self._terms.members[peer].public
        secret = keys.pair_secret(self._sealing, self._static, view.keys[peer].sealing, static)
        return keys.derive(secret, "shares", view.digest, sender, receiver)

    def _sealed(self, view: View, holder: int, self_share: bytes, key_share: bytes) -> SealedShares:
        of_self, of_key = commitments(view.digest, self.number, holder, self_share, key_share)
        box_key = self._box_key(view, self.number, holder)
        box = keys.seal(box_key, self_share + key_share, of_self + of_key)
        return SealedShares(client=holder, box=box, self_commitment=of_self, key_commitment=of_key)

    def _opened(self, message: RelayedShares) -> dict[int, _Held]:
        senders = ascending((entry.client for entry in message.shares), self._terms)
        if not set(senders) <= set(self._view.neighbours):
            raise SchemaError("shares of a client that is no neighbour")
        if len(senders) < self._terms.threshold:
            raise TooFewLeft(f"{len(senders)} neighbours shared keys, {self._terms.threshold} are due (threshold)")
        return {entry.client: self._open(entry) for entry in message.shares}

    def _open(self, entry: SealedShares) -> _Held:
        name = self._terms.name(entry.client)
        promised = entry.self_commitment, entry.key_commitment
        key = self._box_key(self._view, entry.client, self.number)
        plaintext = keys.unseal(key, entry.box, b"".join(promised))
        if plaintext is None:
            raise ShareError(
                f"{name}: its sealed shares do not open: it, or the server, used other keys than the cards' and the "
                "advertised ones",
                clients=(name,),
                hint="compare the fingerprint of its card",
            )
        held = _Held(plaintext[:SHARE_BYTES], plaintext[SHARE_BYTES:])
        if commitments(self._view.digest, entry.client, self.number, held.self_share, held.key_share) != promised:
            raise ShareError(f"{name}: its shares are not those it committed to", clients=(name,))
        return held


def keys_digest(terms: Terms, message: KeyList) -> bytes:
    """32 bytes over the terms and all advertised keys; also the seed of the graph."""
    return keys.view_of(terms.digest, ((entry.client, entry.sealing + entry.masking) for entry in message.keys))


def commitments(view: bytes, dealer: int, holder: int, self_share: bytes, key_share: bytes) -> tuple[bytes, bytes]:
    """To the share of the self-mask's seed, and to that of the masking key."""
    return (
        keys.commitment(self_share, "self share", view, dealer, holder),
        keys.commitment(key_share, "key share", view, dealer, holder),
    )


def pair_mask(secret: bytes, view: bytes, owner: int, peer: int) -> Mask:
    """What `owner` adds for the mask it has with `peer`; the two add up to 0."""
    key = keys.derive(secret, "pair mask", view, min(owner, peer), max(owner, peer))
    return Mask(key, 1 if owner < peer else -1)
