"""The Noise engine against published vectors, and what it does with messages that are wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import HandshakeError
from shared.secure import symmetric
from shared.secure.noise import IKHFS, MAX_MESSAGE_BYTES, HandshakeState, Pattern, Randomness, public_bytes
from shared.secure.symmetric import CipherState

FOLDER = Path(__file__).parent
VECTORS: dict[str, Any] = json.loads((FOLDER / "noise_vectors.json").read_text())
FROZEN: dict[str, Any] = json.loads((FOLDER / "ikhfs_vector.json").read_text())

NN = Pattern("Noise_NN_25519_AESGCM_SHA256", ((), ()), (("e",), ("e", "ee")))
PATTERNS = {
    pattern.protocol_name: pattern
    for pattern in (
        NN,
        Pattern("Noise_IK_25519_AESGCM_SHA256", ((), ("s",)), (("e", "es", "s", "ss"), ("e", "ee", "se"))),
        Pattern("Noise_XX_25519_AESGCM_SHA256", ((), ()), (("e",), ("e", "ee", "s", "es"), ("s", "se"))),
        Pattern("Noise_KX_25519_AESGCM_SHA256", (("s",), ()), (("e",), ("e", "ee", "se", "s", "es"))),
    )
}
XXHFS = Pattern(
    "Noise_XXhfs_25519+MLKEM768_ChaChaPoly_SHA256",
    ((), ()),
    (("e", "e1"), ("e", "ee", "ekem1", "s", "es"), ("s", "se")),
)


def private(text: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(text))


def side(pattern: Pattern, vector: dict[str, Any], *, initiator: bool) -> HandshakeState:
    """One side of a published vector, with the ephemeral key that it names."""
    own, other = ("init", "resp") if initiator else ("resp", "init")
    static = private(vector[f"{own}_static"]) if f"{own}_static" in vector else None
    known_before = pattern.pre_messages[1 if initiator else 0]
    return HandshakeState(
        pattern,
        initiator=initiator,
        prologue=bytes.fromhex(vector["prologue"]),
        static=static,
        remote_static=public_bytes(private(vector[f"{other}_static"])) if known_before else None,
        randomness=Randomness(x25519=lambda: private(vector[f"{own}_ephemeral"])),
    )


def ikhfs(kem_ciphertext: str = FROZEN["kem_ciphertext"], kem_secret: str = FROZEN["kem_secret"]) -> tuple[Any, Any]:
    """Both sides of the frozen vector."""
    kem = MLKEM768PrivateKey.from_seed_bytes(bytes.fromhex(FROZEN["kem_seed"]))
    secret = bytes.fromhex(kem_secret), bytes.fromhex(kem_ciphertext)
    initiator = HandshakeState(
        IKHFS,
        initiator=True,
        prologue=bytes.fromhex(FROZEN["prologue"]),
        static=private(FROZEN["init_static"]),
        remote_static=public_bytes(private(FROZEN["resp_static"])),
        randomness=Randomness(x25519=lambda: private(FROZEN["init_ephemeral"]), kem=lambda: kem),
    )
    responder = HandshakeState(
        IKHFS,
        initiator=False,
        prologue=bytes.fromhex(FROZEN["prologue"]),
        static=private(FROZEN["resp_static"]),
        randomness=Randomness(x25519=lambda: private(FROZEN["resp_ephemeral"]), encapsulate=lambda _: secret),
    )
    return initiator, responder


@pytest.mark.parametrize("vector", VECTORS["noise"], ids=lambda vector: vector["protocol_name"])
def test_published_vectors(vector: dict[str, Any]) -> None:
    pattern = PATTERNS[vector["protocol_name"]]
    sides = [side(pattern, vector, initiator=True), side(pattern, vector, initiator=False)]
    hashes: list[str] = []
    in_handshake, in_transport = (
        vector["messages"][: len(pattern.messages)],
        vector["messages"][len(pattern.messages) :],
    )
    for turn, message in enumerate(in_handshake):
        hashes.append(sides[0].handshake_hash.hex())
        written = sides[turn % 2].write_message(bytes.fromhex(message["payload"]))
        assert written.hex() == message["ciphertext"]
        assert sides[1 - turn % 2].read_message(written).hex() == message["payload"]
    # These vectors' hash is the one before the last message.
    assert hashes[-1] == vector["handshake_hash"]
    assert sides[0].handshake_hash == sides[1].handshake_hash
    assert sides[0].split() == sides[1].split()
    ciphers = [CipherState(key) for key in sides[0].split()]
    for turn, message in enumerate(in_transport, start=len(in_handshake)):
        assert ciphers[turn % 2].encrypt(b"", bytes.fromhex(message["payload"])).hex() == message["ciphertext"]


class ChaChaPoly:
    """ChaCha20-Poly1305 called as AESGCM is: Noise counts in little-endian there (section 12.3)."""

    def __init__(self, key: bytes) -> None:
        self._cipher = ChaCha20Poly1305(key)

    def encrypt(self, nonce: bytes, data: bytes, associated: bytes) -> bytes:
        return self._cipher.encrypt(nonce[:4] + nonce[:3:-1], data, associated)

    def decrypt(self, nonce: bytes, data: bytes, associated: bytes) -> bytes:
        return self._cipher.decrypt(nonce[:4] + nonce[:3:-1], data, associated)


def test_published_vector_with_a_kem(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens e1 and ekem1, and ML-KEM-768 from a seed, as another implementation has them."""
    monkeypatch.setattr(symmetric, "AESGCM", ChaChaPoly)
    vector = VECTORS["hfs"]
    kem = MLKEM768PrivateKey.from_seed_bytes(bytes.fromhex(vector["init_kem_seed"]))
    initiator = HandshakeState(
        XXHFS,
        initiator=True,
        prologue=b"",
        static=private(vector["init_static"]),
        randomness=Randomness(x25519=lambda: private(vector["init_ephemeral"]), kem=lambda: kem),
    )
    assert len(initiator.write_message()) == 1216
    assert initiator.read_message(bytes.fromhex(vector["messages"][1]["ciphertext"])) == b""
    assert initiator.remote_static == public_bytes(private(vector["resp_static"]))
    assert initiator.write_message().hex() == vector["messages"][2]["ciphertext"]
    assert initiator.handshake_hash.hex() == vector["handshake_hash"]
    assert [key.hex() for key in initiator.split()] == vector["split"]


def test_mlkem768_known_answer() -> None:
    vector = VECTORS["mlkem768"]
    kem = MLKEM768PrivateKey.from_seed_bytes(bytes.fromhex(vector["seed"]))
    assert kem.decapsulate(bytes.fromhex(vector["c"])).hex() == vector["K"]


def test_the_product_pattern_is_the_standard_one() -> None:
    assert IKHFS.protocol_name == "Noise_IKhfs_25519+MLKEM768_AESGCM_SHA256"
    assert IKHFS.pre_messages == ((), ("s",))
    assert IKHFS.messages == (("e", "es", "e1", "s", "ss"), ("e", "ee", "ekem1", "se"))


def test_frozen_ikhfs_vector() -> None:
    initiator, responder = ikhfs()
    message_1 = initiator.write_message()
    assert message_1.hex() == FROZEN["message_1"]
    assert responder.read_message(message_1) == b""
    assert responder.remote_static == public_bytes(private(FROZEN["init_static"]))
    message_2 = responder.write_message(bytes.fromhex(FROZEN["payload"]))
    assert message_2.hex() == FROZEN["message_2"]
    assert initiator.read_message(message_2).hex() == FROZEN["payload"]
    for state in (initiator, responder):
        assert state.finished
        assert state.handshake_hash.hex() == FROZEN["handshake_hash"]
        assert [key.hex() for key in state.split()] == FROZEN["split"]


def test_fresh_keys_give_fresh_handshakes() -> None:
    static = private(FROZEN["resp_static"])
    splits = set()
    for _ in range(2):
        initiator = HandshakeState(
            IKHFS,
            initiator=True,
            prologue=b"",
            static=private(FROZEN["init_static"]),
            remote_static=public_bytes(static),
        )
        responder = HandshakeState(IKHFS, initiator=False, prologue=b"", static=static)
        responder.read_message(initiator.write_message())
        initiator.read_message(responder.write_message())
        assert initiator.split() == responder.split()
        splits.add(initiator.split())
    assert len(splits) == 2


def test_the_kem_secret_is_part_of_the_keys() -> None:
    """Everything else equal, one bit in the KEM's secret: message 2 does not open, and the keys differ."""
    initiator, responder = ikhfs(kem_secret=flip(bytes.fromhex(FROZEN["kem_secret"]), 0).hex())
    responder.read_message(initiator.write_message())
    message_2 = responder.write_message(b"attestation")
    assert [key.hex() for key in responder.split()] != FROZEN["split"]
    with pytest.raises(HandshakeError):
        initiator.read_message(message_2)


def test_a_ciphertext_for_another_kem_key_does_not_do() -> None:
    _, foreign = MLKEM768PrivateKey.from_seed_bytes(bytes(64)).public_key().encapsulate()
    initiator, responder = ikhfs(kem_ciphertext=foreign.hex())
    responder.read_message(initiator.write_message())
    with pytest.raises(HandshakeError):
        initiator.read_message(responder.write_message())


def flip(message: bytes, bit: int) -> bytes:
    changed = bytearray(message)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_changed_bit_anywhere_is_found_and_changes_nothing(data: st.DataObject) -> None:
    initiator, responder = ikhfs()
    message_1 = initiator.write_message()
    with pytest.raises(HandshakeError):
        responder.read_message(flip(message_1, data.draw(st.integers(0, 8 * len(message_1) - 1))))
    responder.read_message(message_1)
    message_2 = responder.write_message()
    with pytest.raises(HandshakeError):
        initiator.read_message(flip(message_2, data.draw(st.integers(0, 8 * len(message_2) - 1))))
    initiator.read_message(message_2)
    assert initiator.split() == responder.split()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, len(FROZEN["message_1"]) // 2 - 1))
def test_a_shortened_message_is_refused_and_changes_nothing(size: int) -> None:
    _, responder = ikhfs()
    message = bytes.fromhex(FROZEN["message_1"])
    before = responder.handshake_hash
    with pytest.raises(HandshakeError):
        responder.read_message(message[:size])
    assert responder.handshake_hash == before
    assert responder.read_message(message) == b""


def test_too_long_messages_are_refused() -> None:
    initiator, responder = ikhfs()
    with pytest.raises(HandshakeError, match="65535"):
        initiator.write_message(bytes(MAX_MESSAGE_BYTES))
    with pytest.raises(HandshakeError, match="65535"):
        responder.read_message(bytes(MAX_MESSAGE_BYTES + 1))
    responder.read_message(initiator.write_message())


@pytest.mark.parametrize("ephemeral", [bytes(32), bytes([1]) + bytes(31)])
def test_keys_of_low_order_are_refused(ephemeral: bytes) -> None:
    state = HandshakeState(NN, initiator=False, prologue=b"")
    state.read_message(ephemeral)
    with pytest.raises(HandshakeError, match="X25519"):
        state.write_message()


def test_a_kem_key_that_is_none_is_refused() -> None:
    """FIPS 203, section 7.2: coefficients are below 3329."""
    state = HandshakeState(XXHFS, initiator=False, prologue=b"", static=private(FROZEN["resp_static"]))
    with pytest.raises(HandshakeError, match="FIPS 203"):
        state.read_message(bytes(32) + b"\xff" * 1184)


def out_of_turn() -> list[tuple[str, Callable[[Any, Any], object]]]:
    return [
        ("responder writes first", lambda initiator, responder: responder.write_message()),
        ("initiator reads first", lambda initiator, responder: initiator.read_message(b"")),
        ("keys before the end", lambda initiator, responder: initiator.split()),
        ("the other key before it came", lambda initiator, responder: responder.remote_static),
    ]


@pytest.mark.parametrize("act", [act for _, act in out_of_turn()], ids=[name for name, _ in out_of_turn()])
def test_out_of_turn_is_refused_and_changes_nothing(act: Callable[[Any, Any], object]) -> None:
    initiator, responder = ikhfs()
    with pytest.raises(HandshakeError):
        act(initiator, responder)
    assert responder.read_message(initiator.write_message()) == b""


def test_a_finished_handshake_takes_no_message() -> None:
    initiator, responder = ikhfs()
    responder.read_message(initiator.write_message())
    initiator.read_message(responder.write_message())
    for state in (initiator, responder):
        with pytest.raises(HandshakeError, match="due"):
            state.write_message()
        with pytest.raises(HandshakeError, match="due"):
            state.read_message(b"")


def test_a_pattern_without_the_keys_that_it_needs_is_refused() -> None:
    with pytest.raises(HandshakeError, match="other static key"):
        HandshakeState(IKHFS, initiator=True, prologue=b"", static=private(FROZEN["init_static"]))
    with pytest.raises(HandshakeError, match="own static key"):
        HandshakeState(IKHFS, initiator=False, prologue=b"")
    with pytest.raises(HandshakeError, match="X25519"):
        HandshakeState(
            IKHFS, initiator=True, prologue=b"", static=private(FROZEN["init_static"]), remote_static=b"short"
        ).write_message()


def test_keys_show_in_no_repr() -> None:
    initiator, _ = ikhfs()
    initiator.write_message()
    key = initiator._progress.symmetric.cipher.key
    assert key is not None
    assert repr(key) not in repr(initiator._progress)
    assert repr(initiator._progress.symmetric.ck) not in repr(initiator._progress)
