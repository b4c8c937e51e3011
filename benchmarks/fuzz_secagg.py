"""Secure sums of four clients, played with fixed keys up to any phase, and what is valid there: fuzzing's first inputs.

Client 0 and the server get foreign bytes; the others do as they should. All sums are under a group's key. An input is
the number of the phase (1 byte), at a server the sender (1 byte), and then the message's frames.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from benchmarks.fuzz_frames import joined
from shared.identity import Identity, card_of
from shared.payload.messages import pack
from shared.payload.schema import Message
from shared.secure.noise import public_bytes
from shared.secure_aggregation import shamir
from shared.secure_aggregation.client import Client
from shared.secure_aggregation.fixed_point import Floats
from shared.secure_aggregation.group_key import GroupKey
from shared.secure_aggregation.messages import RingRound
from shared.secure_aggregation.ring import RingMember, RingServer
from shared.secure_aggregation.server import Server
from shared.secure_aggregation.shamir import Random
from shared.secure_aggregation.terms import RingTerms, Terms, roster
from shared.wire.curve import LinkKeys

CLIENTS, LENGTH = 4, 5
# Of a sum by SecAgg, as a client sees them: nothing done, then after each of the server's messages; of a ring.
SUM_PHASES, RING_PHASES = 5, 3


def _identity(number: int) -> Identity:
    private = X25519PrivateKey.from_private_bytes(bytes([10 + number]) * 32)
    return Identity(f"client-{number}", private, public_bytes(private), LinkKeys(bytes(32), bytes(32)))


IDENTITIES = [_identity(number) for number in range(CLIENTS)]
COMMON: dict[str, Any] = {
    "label": bytes(32).hex(),
    "members": roster([card_of(identity) for identity in IDENTITIES]),
    "length": LENGTH,
    "clip": 1.0,
    "max_weight": 100,
    "largest_error": 1e-4,
    "group_key": True,
}
TERMS, RING_TERMS = Terms(neighbours=3, threshold=2, **COMMON), RingTerms(minimum=3, **COMMON)
GROUP = GroupKey(b"g" * 32)


def drawn(number: int) -> Random:
    """The same bytes in every process, others for each client and call."""
    calls = count()

    def random(size: int) -> bytes:
        return hashlib.shake_128(b"%d %d" % (number, next(calls))).digest(size)

    return random


def update_of(number: int) -> tuple[Floats, int]:
    return np.linspace(-1, 1, LENGTH, dtype=np.float32) / np.float32(number + 1), number + 1


@dataclass
class Told:
    """A message and the words after it, if there are any."""

    message: Message
    words: bytes | None = None

    def frames(self) -> list[Any]:
        return pack(self.message, [] if self.words is None else [self.words])


@dataclass
class Scene:
    """Everybody of one sum, and by client what the server has told it and it has not yet heard."""

    clients: Sequence[Any]
    server: Any
    told: dict[int, Told] = field(default_factory=dict)


# SecAgg


def secagg(phase: int) -> Scene:
    """`phase` 0: nothing was done; then the server's key list, shares, request and sum are there to be heard."""
    clients = [Client(TERMS, identity, group=GROUP, random=drawn(n)) for n, identity in enumerate(IDENTITIES)]
    scene = Scene(clients, Server(TERMS))
    for done in range(phase):
        for number, sent in secagg_answers(scene, done).items():
            secagg_send(scene.server, done, number, sent)
        scene.told = secagg_close(scene.server, done)
    return scene


def secagg_answers(scene: Scene, phase: int) -> dict[int, Told]:
    """What all clients send in answer to what they were told."""
    answers: dict[int, Told] = {}
    for number, client in enumerate(scene.clients):
        match phase:
            case 0:
                answers[number] = Told(client.advertise_keys())
            case 1:
                answers[number] = Told(client.share_keys(scene.told[number].message))
            case 2:
                message, words = client.mask_input(scene.told[number].message, *update_of(number))
                answers[number] = Told(message, words.tobytes())
            case _:
                answers[number] = Told(client.unmask(scene.told[number].message))
    return answers


def secagg_send(server: Server, phase: int, number: int, sent: Told) -> None:
    message: Any = sent.message
    match phase:
        case 0:
            server.advertise_keys(number, message)
        case 1:
            server.share_keys(number, message)
        case 2:
            server.masked_input(number, message, sent.words or b"")
        case _:
            server.unmask(number, message)


def secagg_close(server: Server, phase: int) -> dict[int, Told]:
    """Raises TooFewLeft, ShareError."""
    match phase:
        case 0:
            return dict.fromkeys(range(CLIENTS), Told(server.close_advertising()))
        case 1:
            return {number: Told(message) for number, message in server.close_sharing().items()}
        case 2:
            return {number: Told(message) for number, message in server.close_inputs().items()}
        case _:
            made = server.finish()
            return dict.fromkeys(range(CLIENTS), Told(made.for_group(), made.words.tobytes()))


def secagg_but_one(phase: int) -> tuple[Scene, Told]:
    """In `phase` (0 to 3) the server has heard all but client 0; what that one sends."""
    scene = secagg(phase)
    answers = secagg_answers(scene, phase)
    for number in range(1, CLIENTS):
        secagg_send(scene.server, phase, number, answers[number])
    return scene, answers[0]


# The ring


def ring(phase: int) -> Scene:
    """`phase` 0: no keys were exchanged, 1: the ring is closed and a sum begins, 2: its sum is there to be opened."""
    members = [RingMember(RING_TERMS, identity, group=GROUP, random=drawn(n)) for n, identity in enumerate(IDENTITIES)]
    scene = Scene(members, RingServer(RING_TERMS))
    for number, member in enumerate(members):
        scene.server.advertise_key(number, member.advertise_key())
    connected = scene.server.close_advertising()
    scene.told = dict.fromkeys(range(CLIENTS), Told(connected))
    if phase >= 1:
        for member in members:
            member.connect(connected)
        scene.told = dict.fromkeys(range(CLIENTS), Told(scene.server.start(range(CLIENTS))))
    if phase >= 2:
        for number, sent in ring_answers(scene).items():
            message: Any = sent.message
            scene.server.masked_input(number, message, sent.words or b"")
        made = scene.server.finish()
        scene.told = dict.fromkeys(range(CLIENTS), Told(made.for_group(), made.words.tobytes()))
    return scene


def ring_answers(scene: Scene) -> dict[int, Told]:
    answers = {}
    for number, member in enumerate(scene.clients):
        message, words = member.mask_input(scene.told[number].message, *update_of(number))
        answers[number] = Told(message, words.tobytes())
    return answers


def ring_but_one(phase: int) -> tuple[Scene, Told]:
    """The server has heard all but client 0: their keys, or their inputs. What that one sends."""
    if phase == 0:
        members = [RingMember(RING_TERMS, who, group=GROUP, random=drawn(n)) for n, who in enumerate(IDENTITIES)]
        scene = Scene(members, RingServer(RING_TERMS))
        for number in range(1, CLIENTS):
            scene.server.advertise_key(number, members[number].advertise_key())
        return scene, Told(members[0].advertise_key())
    scene = ring(1)
    answers = ring_answers(scene)
    for number in range(1, CLIENTS):
        message: Any = answers[number].message
        scene.server.masked_input(number, message, answers[number].words or b"")
    return scene, answers[0]


def ring_round() -> RingRound:
    """The sum that `ring(2)` has."""
    return RingRound(sequence=0, members=tuple(range(CLIENTS)))


# Valid inputs


def _to_clients(scene: Callable[[int], Scene], phases: int, first: int) -> list[bytes]:
    return [bytes([phase]) + joined(scene(phase).told[0].frames()) for phase in range(first, phases)]


def _to_servers(but_one: Callable[[int], tuple[Scene, Told]], phases: int) -> list[bytes]:
    return [bytes([phase, 0]) + joined(but_one(phase)[1].frames()) for phase in range(phases)]


def _dealt() -> list[bytes]:
    """Shares of client 3's seed and of its masking key, by holder; in the second it drops out."""
    dealer = secagg(1).clients[3]
    secrets = dealer._seed, dealer._masking.private_bytes_raw()
    split = [shamir.split(secret, TERMS.threshold, range(1, CLIENTS), drawn(9)) for secret in secrets]
    shares = b"".join(of[point] for point in range(1, CLIENTS) for of in split)
    return [b"\0" + shares, b"\1" + shares]


def _boxes() -> list[bytes]:
    return [bytes(66)]


SECAGG_SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "secagg_client": lambda: _to_clients(secagg, SUM_PHASES, 1),
    "secagg_client_inside": _boxes,
    "secagg_server": lambda: _to_servers(secagg_but_one, SUM_PHASES - 1),
    "secagg_dealer": _dealt,
    "ring_member": lambda: _to_clients(ring, RING_PHASES, 0),
    "ring_server": lambda: _to_servers(ring_but_one, 2),
}
