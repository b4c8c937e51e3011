"""The server's side of SecAgg and SecAgg+, without I/O: it learns the sum of the inputs that came, and who dropped out.

    advertise_keys*  close_advertising → share_keys*  close_sharing → masked_input*  close_inputs → unmask*  finish

The starred ones take one client's message each, as they come; who calls decides when to close a phase (all are there,
or a deadline passed). Whatever raises changes nothing: a message out of turn or repeated is a PhaseError, one that
breaks the rules a SchemaError or TensorError, and a phase that is closed with too few stays open (TooFewLeft), to
wait longer or to give the round up.

Lies about shares are told apart. Every client commits to each share it deals, and its holder, who opens the box,
checks it before it sends its input. So a share that does not fit its commitment is its holder's lie: it is left out
and the holder named (`MaskedSum.liars`). If shares that all fit give a secret other than the one its owner committed
to or advertised, its owner dealt wrong ones: ShareError names it, and the sum is lost.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shared.errors import PhaseError, SchemaError, ShareError, TooFewLeft
from shared.secure_aggregation import graph, keys, shamir
from shared.secure_aggregation.checks import exactly, words_of
from shared.secure_aggregation.client import keys_digest, pair_mask
from shared.secure_aggregation.fixed_point import Floats, Words
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
from shared.secure_aggregation.terms import SumTerms, Terms
from shared.wire.envelope import Frame


class Phase(Enum):
    ADVERTISING = "keys are advertised"
    SHARING = "keys are shared"
    INPUTS = "inputs come"
    UNMASKING = "masks are removed"
    DONE = "the sum is there"


@dataclass(frozen=True)
class MaskedSum:
    """Sums (L + 1,) of these clients' words; under a group key still masked with it.

    `liars`: names of clients whose shares were not those dealt to them.
    """

    words: Words
    contributors: tuple[int, ...]
    liars: tuple[str, ...] = ()

    def mean(self, terms: SumTerms) -> tuple[Floats, int]:
        """The weighted mean, float32 (L,), and the total weight. Raises AggregationError if masks are left."""
        if terms.group_key:
            raise PhaseError("the sum is the clients' alone: they have its key")
        return terms.encoding.mean(self.words, len(self.contributors))

    def for_group(self) -> GroupSum:
        """What goes to the clients with the words, under a group key."""
        return GroupSum(contributors=len(self.contributors), words=len(self.words))


@dataclass(frozen=True)
class _Dealt:
    """What one client committed to: its self-mask's seed, and by holder both shares."""

    seed: bytes
    shares: dict[int, tuple[bytes, bytes]]


@dataclass
class _Shares:
    """Shares that came and fit, by owner and then holder's point."""

    of_seeds: dict[int, dict[int, bytes]] = field(default_factory=dict)
    of_keys: dict[int, dict[int, bytes]] = field(default_factory=dict)


class Server:
    """One sum among the members of `terms`. Holds one vector, and per pair of neighbours some 500 bytes."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._phase = Phase.ADVERTISING
        self._keys: dict[int, ClientKeys] = {}
        self._digest = b""
        self._neighbours: dict[int, list[int]] = {}
        self._shared: dict[int, ShareKeys] = {}
        self._dealt: dict[int, _Dealt] = {}
        self._summed: set[int] = set()
        self._sum = np.zeros(terms.length + 1, terms.encoding.dtype)
        self._requests: dict[int, UnmaskRequest] = {}
        self._answered: set[int] = set()
        self._shares = _Shares()
        self._liars: set[int] = set()

    def advertise_keys(self, client: int, message: AdvertiseKeys) -> None:
        self._expect(Phase.ADVERTISING, client, range(len(self._terms.members)), self._keys)
        probe = X25519PrivateKey.generate()
        for key in (message.sealing, message.masking):
            keys.agree(probe, key)
        self._keys[client] = ClientKeys(client=client, sealing=message.sealing, masking=message.masking)

    def close_advertising(self) -> KeyList:
        """What goes to all who advertised keys."""
        self._expect_phase(Phase.ADVERTISING)
        if len(self._keys) <= self._terms.threshold:
            raise self._too_few(f"{len(self._keys)} clients are there", self.waiting_for)
        message = KeyList(keys=tuple(self._keys[client] for client in sorted(self._keys)))
        self._digest = keys_digest(self._terms, message)
        order = graph.shuffled(self._digest, self._keys)
        k = self._terms.neighbours
        self._neighbours = {client: graph.neighbours_at(order, place, k) for place, client in enumerate(order)}
        self._phase = Phase.SHARING
        return message

    def share_keys(self, client: int, message: ShareKeys) -> None:
        self._expect(Phase.SHARING, client, self._keys, self._shared)
        exactly([entry.client for entry in message.shares], self._neighbours[client], "shares")
        self._shared[client] = message

    def close_sharing(self) -> dict[int, RelayedShares]:
        """What goes to each client that goes on: those that shared keys, less who has too few such neighbours."""
        self._expect_phase(Phase.SHARING)
        members = _core(set(self._shared), self._neighbours, self._terms.threshold)
        if len(members) <= self._terms.threshold:
            raise self._too_few(f"{len(members)} clients are left", self.waiting_for)
        boxes: dict[int, list[SealedShares]] = {client: [] for client in members}
        for dealer in sorted(members):
            message = self._shared[dealer]
            for entry in message.shares:
                if entry.client in members:
                    # Made anew: members² times, and three times as fast as model_copy.
                    relayed = SealedShares(
                        client=dealer,
                        box=entry.box,
                        self_commitment=entry.self_commitment,
                        key_commitment=entry.key_commitment,
                    )
                    boxes[entry.client].append(relayed)
            committed = {entry.client: (entry.self_commitment, entry.key_commitment) for entry in message.shares}
            self._dealt[dealer] = _Dealt(message.seed_commitment, committed)
        self._neighbours = {u: [v for v in self._neighbours[u] if v in members] for u in members}
        self._shared = {}
        self._phase = Phase.INPUTS
        return {client: RelayedShares(shares=tuple(entries)) for client, entries in boxes.items()}

    def masked_input(self, client: int, message: MaskedInput, frame: Frame) -> None:
        """Adds the client's words; the frame is not kept."""
        self._expect(Phase.INPUTS, client, self._dealt, self._summed)
        words = words_of(frame, self._terms.encoding, self._terms.length)
        if message.words != len(words):
            raise SchemaError(f"{message.words} words announced, {len(words)} came")
        self._sum += words
        self._summed.add(client)

    def close_inputs(self) -> dict[int, UnmaskRequest]:
        """What goes to each client whose input came."""
        self._expect_phase(Phase.INPUTS)
        for client, neighbours in self._neighbours.items():
            left = sum(1 for other in neighbours if other in self._summed)
            if left < self._terms.threshold:
                raise self._too_few(f"{left} neighbours of {self._terms.name(client)} are left", self.waiting_for)
        summed = tuple(sorted(self._summed))
        self._requests = {
            client: UnmaskRequest(
                summed=summed, dropped=tuple(v for v in self._neighbours[client] if v not in self._summed)
            )
            for client in summed
        }
        self._phase = Phase.UNMASKING
        return self._requests

    def unmask(self, client: int, message: Unmask) -> None:
        """Keeps the shares that are those dealt to this client; one that is not makes it a liar."""
        self._expect(Phase.UNMASKING, client, self._summed, self._answered)
        request = self._requests[client]
        summed = [other for other in self._neighbours[client] if other in self._summed]
        exactly([entry.client for entry in message.self_shares], summed, "shares of seeds")
        exactly([entry.client for entry in message.key_shares], request.dropped, "shares of masking keys")
        self._keep(client, message.self_shares, self._shares.of_seeds, kind=0)
        self._keep(client, message.key_shares, self._shares.of_keys, kind=1)
        self._answered.add(client)

    @property
    def waiting_for(self) -> tuple[int, ...]:
        """Who has not yet sent what this phase is for."""
        due: dict[Phase, tuple[Iterable[int], Iterable[int]]] = {
            Phase.ADVERTISING: (range(len(self._terms.members)), self._keys),
            Phase.SHARING: (self._keys, self._shared),
            Phase.INPUTS: (self._dealt, self._summed),
            Phase.UNMASKING: (self._summed, self._answered),
            Phase.DONE: ((), ()),
        }
        expected, there = due[self._phase]
        return tuple(sorted(set(expected) - set(there)))

    def finish(self) -> MaskedSum:
        """Takes off the self-masks of those in the sum, and what those that dropped out left in it.

        Raises TooFewLeft if a secret has fewer shares than the threshold, and ShareError for one dealt wrong.
        """
        self._expect_phase(Phase.UNMASKING)
        seeds = {client: self._seed_of(client) for client in sorted(self._summed)}
        masks = [Mask(keys.derive(seed, "self mask", self._digest, u), -1) for u, seed in seeds.items()]
        for client in sorted(self._dealt.keys() - self._summed):
            private = self._masking_key_of(client)
            for peer in self._neighbours[client]:
                if peer in self._summed:
                    # What the one that dropped out would have added is what is missing.
                    secret = keys.agree(private, self._keys[peer].masking)
                    masks.append(pair_mask(secret, self._digest, client, peer))
        add_masks(self._sum, masks)
        self._phase = Phase.DONE
        liars = tuple(self._terms.name(client) for client in sorted(self._liars))
        return MaskedSum(self._sum, tuple(sorted(self._summed)), liars)

    def _expect_phase(self, phase: Phase) -> None:
        if self._phase is not phase:
            raise PhaseError(f"out of turn: {self._phase.value}")

    def _expect(self, phase: Phase, client: int, due: Iterable[int], there: Iterable[int]) -> None:
        self._expect_phase(phase)
        if client not in due:
            raise PhaseError(f"client {client} has no part in this phase")
        if client in there:
            raise PhaseError(f"{self._terms.name(client)} has sent this already")

    def _too_few(self, what: str, missing: Iterable[int]) -> TooFewLeft:
        names = tuple(self._terms.name(client) for client in sorted(missing))
        return TooFewLeft(
            f"{what}, too few for a threshold of {self._terms.threshold} of {self._terms.neighbours} neighbours",
            clients=names,
            hint="do the round again with those that are there",
        )

    def _keep(self, holder: int, shares: Iterable[Share], kept: dict[int, dict[int, bytes]], *, kind: int) -> None:
        purpose = ("self share", "key share")[kind]
        for entry in shares:
            committed = self._dealt[entry.client].shares[holder][kind]
            if keys.commitment(entry.share, purpose, self._digest, entry.client, holder) == committed:
                kept.setdefault(entry.client, {})[holder + 1] = entry.share
            else:
                self._liars.add(holder)

    def _secret(self, client: int, kept: dict[int, dict[int, bytes]]) -> bytes | None:
        shares = kept.get(client, {})
        if len(shares) < self._terms.threshold:
            raise self._too_few(
                f"{len(shares)} right shares of the masks of {self._terms.name(client)}",
                (self._summed - self._answered) | self._liars,
            )
        return shamir.combine(dict(list(shares.items())[: self._terms.threshold]))

    def _seed_of(self, client: int) -> bytes:
        seed = self._secret(client, self._shares.of_seeds)
        if seed is None or keys.commitment(seed, "seed", self._digest, client) != self._dealt[client].seed:
            raise self._dealt_wrong(client)
        return seed

    def _masking_key_of(self, client: int) -> X25519PrivateKey:
        secret = self._secret(client, self._shares.of_keys)
        if secret is not None:
            private = X25519PrivateKey.from_private_bytes(secret)
            if private.public_key().public_bytes_raw() == self._keys[client].masking:
                return private
        raise self._dealt_wrong(client)

    def _dealt_wrong(self, client: int) -> ShareError:
        name = self._terms.name(client)
        return ShareError(
            f"{name}: the shares it dealt do not give its secret; the sum is lost",
            clients=(name,),
            hint=f"do the round again without {name}",
        )


def _core(clients: set[int], neighbours: dict[int, list[int]], threshold: int) -> set[int]:
    """The largest subset in which everybody has `threshold` neighbours."""
    while True:
        lonely = {u for u in clients if sum(1 for v in neighbours[u] if v in clients) < threshold}
        if not lonely:
            return clients
        clients = clients - lonely
