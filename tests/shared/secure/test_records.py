"""Sealed records: what opens, what does not, and that nothing moves when something does not."""

import json
import mmap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import FrameError, OrderError, ReplayError, SealError
from shared.secure import records
from shared.secure.records import MAX_FRAME_BYTES, REKEY_RECORDS, Channel, Opener, Sealer
from shared.secure.symmetric import rekey
from shared.wire.envelope import MAX_BODY_FRAMES, Accept, Close, Data, Envelope, associated_data, pack, parse

SESSION = b"0123456789abcdef"
SEND, RECEIVE = bytes(range(32)), bytes(range(32, 64))
FRAMES = [b"header of the message", b"", bytes(range(256)) * 5]
VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "record_vectors.json").read_text())


def channels() -> tuple[Channel, Channel]:
    return (
        Channel(SESSION, send_key=SEND, receive_key=RECEIVE),
        Channel(SESSION, send_key=RECEIVE, receive_key=SEND),
    )


def wire(envelope: Envelope) -> Envelope:
    """The envelope as the other side gets it."""
    return parse([bytes(frame) for frame in envelope.frames()])


def test_records_open_in_order_in_both_directions() -> None:
    client, server = channels()
    for number in range(3):
        for sender, receiver in ((client, server), (server, client)):
            sealed = sender.seal(FRAMES)
            assert sealed.header == Data(session=SESSION, sequence=number)
            assert receiver.open(wire(sealed)) == FRAMES


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=200), min_size=1, max_size=8))
def test_any_frames_come_back(frames: list[bytes]) -> None:
    client, server = channels()
    sealed = client.seal(frames)
    assert [len(frame) for frame in sealed.body] == [len(frame) + 16 for frame in frames]
    assert server.open(wire(sealed)) == frames


def test_any_contiguous_buffer_can_be_sealed() -> None:
    client, server = channels()
    words = memoryview(bytearray(64)).cast("Q", (2, 4))
    nothing = memoryview(bytearray(8)).cast("Q")[:0]
    assert server.open(client.seal([bytearray(b"a"), words, nothing])) == [b"a", bytes(64), b""]


def test_a_buffer_with_gaps_is_refused_before_anything_is_sealed() -> None:
    client, server = channels()
    with pytest.raises(FrameError, match="contiguous"):
        client.seal([b"a", memoryview(b"abcdef")[::2]])
    assert server.open(client.seal([b"a"])) == [b"a"]


def test_the_construction_is_the_documented_one() -> None:
    client, _ = channels()
    client.seal([b""])
    sealed = client.seal(FRAMES)
    associated = b"D" + (3).to_bytes(4, "big") + sealed.raw_header
    for index, frame in enumerate(FRAMES):
        nonce = index.to_bytes(4, "big") + (1).to_bytes(8, "big")
        assert sealed.body[index] == AESGCM(SEND).encrypt(nonce, frame, associated)


def test_frozen_vectors() -> None:
    session, key = bytes.fromhex(VECTORS["session"]), bytes.fromhex(VECTORS["key"])
    sealer, opener = Sealer(session, key), Opener(session, key)
    for record in VECTORS["records"]:
        while opener._direction.sequence < record["sequence"]:
            opener.open(sealer.seal([b""]))
        frames = [bytes.fromhex(frame) for frame in record["plaintext"]]
        sealed = sealer.seal(frames)
        assert [bytes(frame).hex() for frame in sealed.frames()] == record["wire"]
        assert opener.open(parse([bytes.fromhex(frame) for frame in record["wire"]])) == frames


def tampered() -> list[tuple[str, Callable[[Envelope], Envelope], type[SealError]]]:
    def flip(frame: int) -> Callable[[Envelope], Envelope]:
        def change(sealed: Envelope) -> Envelope:
            body = [bytearray(part) for part in sealed.body]
            body[frame][len(body[frame]) // 2] ^= 1
            return replace(sealed, body=body)

        return change

    def header(data: Data) -> Callable[[Envelope], Envelope]:
        return lambda sealed: pack(data, sealed.body)

    return [
        *((f"bit in frame {index}", flip(index), SealError) for index in range(len(FRAMES))),
        ("frames swapped", lambda sealed: replace(sealed, body=sealed.body[::-1]), SealError),
        ("frame dropped", lambda sealed: replace(sealed, body=sealed.body[:-1]), SealError),
        ("frame doubled", lambda sealed: replace(sealed, body=[*sealed.body, sealed.body[0]]), SealError),
        ("no frames", lambda sealed: replace(sealed, body=[]), SealError),
        ("frame cut", lambda sealed: replace(sealed, body=[sealed.body[0][:-1], *sealed.body[1:]]), SealError),
        ("frame below a tag", lambda sealed: replace(sealed, body=[b"short", *sealed.body[1:]]), SealError),
        ("header bytes", lambda sealed: replace(sealed, raw_header=sealed.raw_header + b"\xc0"), SealError),
        ("another session", header(Data(session=b"x" * 16, sequence=1)), SealError),
        ("another kind", lambda sealed: pack(Accept(session=SESSION), sealed.body), SealError),
        ("CLOSE", lambda sealed: pack(Close(session=SESSION, code="bye", message="")), SealError),
        ("sequence lowered", header(Data(session=SESSION, sequence=0)), ReplayError),
        ("sequence raised", header(Data(session=SESSION, sequence=2)), OrderError),
        ("sequence far ahead", header(Data(session=SESSION, sequence=2**63 - 1)), OrderError),
    ]


@pytest.mark.parametrize(("change", "error"), [case[1:] for case in tampered()], ids=[case[0] for case in tampered()])
def test_what_was_changed_does_not_open_and_changes_nothing(
    change: Callable[[Envelope], Envelope], error: type[SealError]
) -> None:
    client, server = channels()
    server.open(client.seal([b"first"]))
    sealed = client.seal(FRAMES)
    for _ in range(2):
        with pytest.raises(SealError) as caught:
            server.open(change(sealed))
        assert type(caught.value) is error
    assert server.open(sealed) == FRAMES
    assert server.open(client.seal([b"third"])) == [b"third"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_flipped_bit_anywhere_in_a_body_is_found(data: st.DataObject) -> None:
    client, server = channels()
    sealed = client.seal([b"one", b"two"])
    body = [bytearray(frame) for frame in sealed.body]
    frame = data.draw(st.integers(0, 1))
    bit = data.draw(st.integers(0, 8 * len(body[frame]) - 1))
    body[frame][bit // 8] ^= 1 << bit % 8
    with pytest.raises(SealError):
        server.open(replace(sealed, body=body))


def test_a_replayed_record_does_not_open() -> None:
    client, server = channels()
    sealed = client.seal(FRAMES)
    server.open(sealed)
    with pytest.raises(ReplayError):
        server.open(sealed)


def test_reordered_records_open_only_in_order() -> None:
    client, server = channels()
    first, second = client.seal([b"first"]), client.seal([b"second"])
    with pytest.raises(OrderError):
        server.open(second)
    assert server.open(first) == [b"first"]
    assert server.open(second) == [b"second"]


def test_a_reflected_record_does_not_open() -> None:
    client, server = channels()
    sealed = client.seal(FRAMES)
    with pytest.raises(SealError):
        client.open(sealed)
    assert server.open(sealed) == FRAMES


def test_a_record_of_another_session_does_not_open_even_under_the_same_keys() -> None:
    _, server = channels()
    other = Channel(b"another session!", send_key=SEND, receive_key=RECEIVE)
    with pytest.raises(SealError, match="no record of this session"):
        server.open(other.seal(FRAMES))


def test_a_record_of_another_key_does_not_open() -> None:
    _, server = channels()
    with pytest.raises(SealError, match="does not open"):
        server.open(Sealer(SESSION, bytes(32)).seal(FRAMES))


def test_both_directions_change_keys_on_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "REKEY_RECORDS", 4)
    client, server = channels()
    keys = {client.sealer._direction._key}
    for number in range(12):
        assert server.open(client.seal([b"record"])) == [b"record"]
        assert client.sealer._direction._key == server.opener._direction._key
        keys.add(client.sealer._direction._key)
        assert len(keys) == 1 + (number + 1) // 4
    assert server.sealer._direction._key == RECEIVE


def test_after_a_change_the_old_key_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "REKEY_RECORDS", 1)
    client, server = channels()
    server.open(client.seal([b"first"]))
    sealed = client.seal([b"second"])
    nonce = bytes(4) + (1).to_bytes(8, "big")
    body = [AESGCM(SEND).encrypt(nonce, b"forged", associated_data(sealed))]
    with pytest.raises(SealError):
        server.open(replace(sealed, body=body))
    assert server.open(sealed) == [b"second"]


def test_a_failure_at_the_change_of_keys_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "REKEY_RECORDS", 2)
    client, server = channels()
    for _ in range(5):
        sealed = client.seal(FRAMES)
        with pytest.raises(SealError):
            server.open(replace(sealed, body=[bytes(len(frame)) for frame in sealed.body]))
        assert server.open(sealed) == FRAMES


@pytest.mark.parametrize("count", [0, MAX_BODY_FRAMES + 1])
def test_the_number_of_frames_has_limits(count: int) -> None:
    client, server = channels()
    with pytest.raises(FrameError, match="4096"):
        client.seal([b""] * count)
    most = [b"x"] * MAX_BODY_FRAMES
    assert server.open(wire(client.seal(most))) == most


def test_the_size_of_a_frame_has_a_limit() -> None:
    client, server = channels()
    with mmap.mmap(-1, MAX_FRAME_BYTES + 17) as large:  # never touched, so never in memory
        with memoryview(large)[:-16] as plain, pytest.raises(FrameError, match="tokens"):
            client.seal([b"x", plain])
        sealed = client.seal([b"x"])
        with memoryview(large) as frame, pytest.raises(SealError, match="which no seal has"):
            server.open(replace(sealed, body=[frame]))
    assert server.open(sealed) == [b"x"]


def test_rekey_is_the_one_of_noise() -> None:
    """Section 4.2: the first 32 bytes of ENCRYPT(k, 2^64 - 1, "", zeros), here made with AES-CTR as GCM does."""
    first_block = bytes(4) + b"\xff" * 8 + (2).to_bytes(4, "big")
    encryptor = Cipher(algorithms.AES256(SEND), modes.CTR(first_block)).encryptor()
    assert rekey(SEND) == encryptor.update(bytes(32))


def test_keys_change_after_65536_records() -> None:
    assert REKEY_RECORDS == 65536
