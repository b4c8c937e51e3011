"""Secure aggregation under foreign bytes, in any phase: nothing but the errors that are promised, and then no change.

What is refused leaves all of a client or a server as it was, keys, shares, sums and phase; so one stands for many
inputs, until it takes one. What a server takes is carried to the end of its phase, which may fail by then, also only
with an error of its own.
"""

import functools
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import TypeAdapter

from benchmarks.fuzz_frames import separated
from benchmarks.fuzz_registry import target
from benchmarks.fuzz_secagg import (
    CLIENTS,
    RING_PHASES,
    SUM_PHASES,
    TERMS,
    Told,
    ring,
    ring_but_one,
    ring_round,
    secagg,
    secagg_answers,
    secagg_but_one,
    secagg_close,
    secagg_send,
    update_of,
)
from shared.errors import AggregationError, FlglmError, PhaseError, SchemaError, ShareError, TensorError, TooFewLeft
from shared.payload.messages import message_of
from shared.secure_aggregation import keys
from shared.secure_aggregation.checks import words_of
from shared.secure_aggregation.client import Client, commitments
from shared.secure_aggregation.fixed_point import Words
from shared.secure_aggregation.messages import (
    CLIENT_MESSAGES,
    SERVER_MESSAGES,
    AdvertiseKeys,
    GroupSum,
    KeyList,
    MaskedInput,
    RelayedShares,
    RingInput,
    RingKey,
    RingKeys,
    RingRound,
    SealedShares,
    ShareKeys,
    Unmask,
    UnmaskRequest,
)
from shared.secure_aggregation.ring import RingMember
from shared.secure_aggregation.shamir import SHARE_BYTES

# Remembered, not state: what it holds follows from keys that are.
CACHES = ("_secrets",)


@target(PhaseError, SchemaError, ShareError, TooFewLeft, TensorError, AggregationError)
def secagg_client(data: bytes) -> None:
    """Client 0 gets whatever the server says, in any phase."""
    phase = data[0] % SUM_PHASES if data else 0
    told = _told(SERVER_MESSAGES, data[1:])
    scene = _standing(secagg, phase)
    _taken_or_unchanged(scene.clients[0], lambda: _hear(scene.clients[0], told), lambda: _used(secagg, phase))


@target(ShareError)
def secagg_client_inside(data: bytes) -> None:
    """A neighbour seals anything for client 0, with commitments to it or to something else."""
    plaintext = data[:66].ljust(66, b"\0")
    scene = _standing(secagg, 2)
    view, relayed = scene.clients[1]._view, scene.told[0].message
    assert isinstance(relayed, RelayedShares)
    promised = commitments(view.digest, 1, 0, plaintext[:SHARE_BYTES], plaintext[SHARE_BYTES:])
    of_self, of_key = promised if len(data) <= 66 else (data[66:98].ljust(32, b"\0"), promised[1])
    box = keys.seal(scene.clients[1]._box_key(view, 1, 0), plaintext, of_self + of_key)
    entry = SealedShares(client=1, box=box, self_commitment=of_self, key_commitment=of_key)
    shares = tuple(entry if other.client == 1 else other for other in relayed.shares)
    told = Told(RelayedShares(shares=shares))
    _taken_or_unchanged(scene.clients[0], lambda: _hear(scene.clients[0], told), lambda: _used(secagg, 2))


@target(PhaseError, SchemaError, ShareError, TooFewLeft, TensorError)
def secagg_server(data: bytes) -> None:
    """The server gets whatever a client says, in any phase; it has heard all others but client 0."""
    phase, sender = (data[0] % (SUM_PHASES - 1), data[1] % CLIENTS) if len(data) > 1 else (0, 0)
    told = _told(CLIENT_MESSAGES, data[2:])
    scene, _ = _standing(secagg_but_one, phase)
    server = scene.server

    def hear() -> None:
        match told.message:
            case AdvertiseKeys():
                server.advertise_keys(sender, told.message)
            case ShareKeys():
                server.share_keys(sender, told.message)
            case MaskedInput():
                server.masked_input(sender, told.message, told.words or b"")
            case Unmask():
                server.unmask(sender, told.message)
            case _:
                raise SchemaError("no message of a sum by SecAgg")

    _taken_or_unchanged(server, hear, lambda: _used(secagg_but_one, phase))
    secagg_close(server, phase)


@target(ShareError, TooFewLeft)
def secagg_dealer(data: bytes) -> None:
    """Client 3 deals any shares, which all hold and hand out as they came: the sum comes, or the dealer is named."""
    drops, dealt = bool(data[:1] == b"\1"), data[1:].ljust(6 * SHARE_BYTES, b"\0")
    scene = secagg(1)
    sent = secagg_answers(scene, 1)
    sent[3] = Told(_dealt_shares(scene.clients[3], dealt))
    for phase in (1, 2, 3):
        for number, message in sent.items():
            if not (drops and number == 3 and phase > 1):
                secagg_send(scene.server, phase, number, message)
        if phase == 3:
            break
        scene.told = secagg_close(scene.server, phase)
        there = [number for number in range(CLIENTS) if number in scene.told]
        sent = {number: _answer(scene.clients[number], scene.told[number], number) for number in there}
    try:
        secagg_close(scene.server, 3)
    except ShareError as error:
        if error.clients != ("client-3",):
            raise AssertionError("an honest client is blamed") from error
        raise


@target(PhaseError, SchemaError, TooFewLeft, TensorError, AggregationError)
def ring_member(data: bytes) -> None:
    """Client 0 of a ring gets whatever the server says: before it is in the ring, before a sum, before it is opened."""
    phase = data[0] % RING_PHASES if data else 0
    told = _told(SERVER_MESSAGES, data[1:])
    scene = _standing(ring, phase)
    member: RingMember = scene.clients[0]

    def hear() -> None:
        match told.message:
            case RingKeys():
                member.connect(told.message)
            case RingRound():
                _check_masked(member.mask_input(told.message, *update_of(0))[1])
            case GroupSum():
                member.open_sum(ring_round(), told.message, _words(told))
            case _:
                raise SchemaError("no message of a ring")

    _taken_or_unchanged(member, hear, lambda: _used(ring, phase))


@target(PhaseError, SchemaError, TooFewLeft, TensorError)
def ring_server(data: bytes) -> None:
    """A ring's server gets whatever a client says, keys or inputs; it has heard all others but client 0."""
    phase, sender = (data[0] % 2, data[1] % CLIENTS) if len(data) > 1 else (0, 0)
    told = _told(CLIENT_MESSAGES, data[2:])
    scene, _ = _standing(ring_but_one, phase)
    server = scene.server

    def hear() -> None:
        match told.message:
            case RingKey():
                server.advertise_key(sender, told.message)
            case RingInput():
                server.masked_input(sender, told.message, told.words or b"")
            case _:
                raise SchemaError("no message of a ring")

    _taken_or_unchanged(server, hear, lambda: _used(ring_but_one, phase))
    if phase == 0:
        server.close_advertising()
    else:
        server.finish()


# Inside


@functools.cache
def _scenes() -> dict[tuple[Callable[[int], Any], int], Any]:
    return {}


def _standing(make: Callable[[int], Any], phase: int) -> Any:
    """The scene at this phase; the one that was there before, as long as all that came was refused."""
    scenes = _scenes()
    if (make, phase) not in scenes:
        scenes[make, phase] = make(phase)
    return scenes[make, phase]


def _used(make: Callable[[int], Any], phase: int) -> None:
    del _scenes()[make, phase]


def _taken_or_unchanged(machine: Any, hear: Callable[[], None], used: Callable[[], None]) -> None:
    """Forget the scene of what was taken; of what was refused everything is as before."""
    before = _state(machine)
    try:
        hear()
    except FlglmError:
        assert _state(machine) == before, "what was refused has changed something"
        raise
    used()


def _state(value: Any) -> Any:
    """All of it, to compare; secrets too."""
    if isinstance(value, X25519PrivateKey):
        return value.private_bytes_raw()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return {key: _state(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_state(each) for each in value]
    if isinstance(value, set):
        return set(value)
    if is_dataclass(value) or (
        type(value).__module__.startswith("shared.secure_aggregation") and hasattr(value, "_terms")
    ):
        return {name: _state(each) for name, each in vars(value).items() if name not in CACHES}
    return value


def _told(schema: TypeAdapter[Any], data: bytes) -> Told:
    """A message, and the frame after it if there is one. Raises SchemaError."""
    frames = separated(data)
    if not 1 <= len(frames) <= 2:
        raise SchemaError(f"{len(frames)} frames")
    return Told(message_of(schema, frames[0]), *frames[1:])


def _hear(client: Client, told: Told) -> None:
    """What a client of a SecAgg sum does with a message."""
    match told.message:
        case KeyList():
            client.share_keys(told.message)
        case RelayedShares():
            _check_masked(client.mask_input(told.message, *update_of(0))[1])
        case UnmaskRequest():
            answer = client.unmask(told.message)
            assert not {s.client for s in answer.self_shares} & {s.client for s in answer.key_shares}
        case GroupSum():
            client.open_sum(told.message, _words(told))
        case _:
            raise SchemaError("no message of a sum by SecAgg")


def _answer(client: Client, told: Told, number: int) -> Told:
    if isinstance(told.message, UnmaskRequest):
        return Told(client.unmask(told.message))
    assert isinstance(told.message, RelayedShares)
    message, words = client.mask_input(told.message, *update_of(number))
    return Told(message, words.tobytes())


def _dealt_shares(client: Client, dealt: bytes) -> ShareKeys:
    """As `client.share_keys` made them, but of these shares: a self-mask's and a key's for each of three holders."""
    view, number = client._view, client.number
    pieces = [dealt[at : at + SHARE_BYTES] for at in range(0, 6 * SHARE_BYTES, SHARE_BYTES)]
    shares = tuple(client._sealed(view, holder, *pieces[2 * holder : 2 * holder + 2]) for holder in view.neighbours)
    return ShareKeys(seed_commitment=keys.commitment(client._seed, "seed", view.digest, number), shares=shares)


def _words(told: Told) -> Words:
    """To be changed in place. Raises TensorError."""
    return words_of(told.words or b"", TERMS.encoding, TERMS.length).copy()


def _check_masked(words: Words) -> None:
    """Nothing of an update goes out without a mask: no word is the one that the encoding gives."""
    plain = TERMS.encoding.encode(*update_of(0))
    assert not (words == plain).all()
