"""Frames and routing headers: what is taken, what is refused, and the bytes, which must not drift."""

import json
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.errors import EnvelopeError, FrameError
from shared.wire.envelope import (
    MAX_BODY_FRAMES,
    MAX_HEADER_BYTES,
    MAX_REASON_CHARS,
    SCHEMAS,
    WITH_BODY,
    Accept,
    Close,
    Data,
    Frame,
    Header,
    Hello,
    Kind,
    Open,
    Ping,
    Pong,
    Welcome,
    associated_data,
    pack,
    parse,
)

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "envelope_vectors.json").read_text())
SESSION, IDENTITY, JOB = b"x" * 16, b"i" * 32, b"j" * 32
EXAMPLES: dict[Kind, dict[str, Any]] = {
    Kind.HELLO: {"version": 1, "role": "server", "identity": IDENTITY},
    Kind.WELCOME: {"version": 1, "heartbeat_s": 2.0, "timeout_s": 15.0},
    Kind.PING: {},
    Kind.PONG: {},
    Kind.OPEN: {"version": 1, "session": SESSION, "server": IDENTITY, "job": JOB},
    Kind.ACCEPT: {"session": SESSION},
    Kind.DATA: {"session": SESSION, "sequence": 7},
    Kind.CLOSE: {"session": SESSION, "code": "done", "message": "ok"},
}


def body_of(kind: Kind) -> list[Frame]:
    return [b"body"] if SCHEMAS[kind] in WITH_BODY else []


def message(kind: Kind, fields: object) -> list[Frame]:
    return [kind.value, msgpack.packb(fields), *body_of(kind)]


def from_vector(vector: dict[str, Any]) -> Header:
    fields = {k: bytes.fromhex(v["hex"]) if isinstance(v, dict) else v for k, v in vector["fields"].items()}
    schema = next(schema for schema in SCHEMAS.values() if schema.__name__ == vector["kind"])
    return schema(**fields)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
def test_the_bytes_on_the_wire_are_frozen(vector: dict[str, Any]) -> None:
    header = from_vector(vector)
    frames: list[Frame] = [bytes.fromhex(frame) for frame in vector["frames"]]
    packed, parsed = pack(header, frames[2:]), parse(frames)
    assert packed.frames() == parsed.frames() == frames
    assert parsed.header == header
    assert associated_data(packed).hex() == associated_data(parsed).hex() == vector["associated_data"]


def test_every_kind_has_a_vector() -> None:
    assert {bytes.fromhex(vector["frames"][0]) for vector in VECTORS} == {kind.value for kind in Kind}


@pytest.mark.parametrize("kind", list(Kind))
def test_what_is_packed_is_parsed_and_passed_on_without_copies(kind: Kind) -> None:
    header = SCHEMAS[kind](**EXAMPLES[kind])
    body = body_of(kind)
    envelope = parse([memoryview(frame) for frame in pack(header, body).frames()])
    assert envelope.header == header
    frames = pack(header, body).frames()
    assert all(after is before for after, before in zip(parse(frames).frames()[2:], body, strict=True))


def test_a_header_is_passed_on_as_it_came() -> None:
    fields = dict(reversed(EXAMPLES[Kind.DATA].items()))
    raw = msgpack.packb(fields)
    envelope = parse([Kind.DATA.value, raw, b"sealed"])
    assert envelope.frames()[1] == raw != pack(envelope.header).raw_header
    assert raw in associated_data(envelope)


def test_the_seal_covers_kind_header_and_number_of_frames() -> None:
    base = associated_data(pack(Data(session=SESSION, sequence=1), [b"one", b"two"]))
    assert base == associated_data(pack(Data(session=SESSION, sequence=1), [b"other", b"bodies"]))
    assert base != associated_data(pack(Data(session=SESSION, sequence=1), [b"onetwo"]))
    assert base != associated_data(pack(Data(session=SESSION, sequence=2), [b"one", b"two"]))
    accept = pack(Accept(session=SESSION), [b"one"])
    assert associated_data(accept)[:1] == Kind.ACCEPT.value


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        ([], "at least 2 frames, got 0"),
        ([b"P"], "at least 2 frames, got 1"),
        ([b"D", b"\x80", *[b""] * (MAX_BODY_FRAMES + 1)], f"at most {MAX_BODY_FRAMES} body frames"),
        ([b"P", bytes(MAX_HEADER_BYTES + 1)], f"at most {MAX_HEADER_BYTES} bytes"),
        ([b"", b"\x80"], "frame 0 is one byte, got 0"),
        ([b"PP", b"\x80"], "frame 0 is one byte, got 2"),
        ([b"P", b"\x80", b"body"], "PING carries no body, got 1 frames"),
        ([b"A", msgpack.packb({"session": SESSION})], "ACCEPT needs a body"),
    ],
)
def test_wrong_numbers_and_sizes_of_frames_are_frame_errors(frames: list[Frame], said: str) -> None:
    with pytest.raises(FrameError, match=said):
        parse(frames)


def test_the_largest_message_is_taken() -> None:
    frames = [b"D", msgpack.packb(EXAMPLES[Kind.DATA]), *[b""] * MAX_BODY_FRAMES]
    assert len(parse(frames).body) == MAX_BODY_FRAMES


def test_the_longest_reason_fits_the_header() -> None:
    longest = pack(Close(session=SESSION, code="a" * 40, message="\U0001f3e5" * MAX_REASON_CHARS))
    assert parse(longest.frames()).header == longest.header


@pytest.mark.parametrize("kind", [b"X", b"\x00", b"\xff", b"d"])
def test_an_unknown_kind_is_an_envelope_error(kind: bytes) -> None:
    with pytest.raises(EnvelopeError, match="unknown kind of message"):
        parse([kind, b"\x80"])


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc1",
        b"\x80\x80",
        b"\x81",
        b"\x91" * MAX_HEADER_BYTES,
        b"\xdf\xff\xff\xff\xff",
        b"\x81\x01\x01",
        b"\x81\xa1\xff\x01",
        b"\xd7\xff" + b"\xff" * 8,
    ],
    ids=["empty", "reserved", "two values", "cut off", "deep", "huge map", "key no string", "no UTF-8", "wrong time"],
)
def test_a_header_that_is_not_one_msgpack_map_is_an_envelope_error(raw: bytes) -> None:
    with pytest.raises(EnvelopeError, match="DATA header that breaks its schema"):
        parse([b"D", raw, b"body"])


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("value", [None, 1, "text", [], [1], True])
def test_a_header_is_a_map(kind: Kind, value: object) -> None:
    with pytest.raises(EnvelopeError):
        parse(message(kind, value))


@pytest.mark.parametrize("kind", list(Kind))
def test_unknown_fields_are_refused(kind: Kind) -> None:
    parse(message(kind, EXAMPLES[kind]))
    with pytest.raises(EnvelopeError):
        parse(message(kind, EXAMPLES[kind] | {"extra": 1}))


REQUIRED = [
    (kind, name)
    for kind, fields in EXAMPLES.items()
    for name in fields
    if SCHEMAS[kind].model_fields[name].is_required()
]


@pytest.mark.parametrize(("kind", "name"), REQUIRED)
def test_missing_fields_are_refused(kind: Kind, name: str) -> None:
    with pytest.raises(EnvelopeError):
        parse(message(kind, {k: v for k, v in EXAMPLES[kind].items() if k != name}))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (Kind.HELLO, "version", "1"),
        (Kind.HELLO, "version", 1.0),
        (Kind.HELLO, "version", True),
        (Kind.HELLO, "role", "broker"),
        (Kind.HELLO, "identity", b"i" * 31),
        (Kind.HELLO, "identity", "i" * 32),
        (Kind.WELCOME, "heartbeat_s", 0.0),
        (Kind.WELCOME, "heartbeat_s", -1.0),
        (Kind.WELCOME, "timeout_s", float("nan")),
        (Kind.WELCOME, "timeout_s", float("inf")),
        (Kind.WELCOME, "timeout_s", 3601.0),
        (Kind.OPEN, "session", b"x" * 15),
        (Kind.OPEN, "server", b"i" * 33),
        (Kind.OPEN, "job", None),
        (Kind.ACCEPT, "session", b"x" * 17),
        (Kind.DATA, "session", "x" * 16),
        (Kind.DATA, "sequence", -1),
        (Kind.DATA, "sequence", 2**63),
        (Kind.DATA, "sequence", 1.0),
        (Kind.CLOSE, "code", ""),
        (Kind.CLOSE, "code", "Upper"),
        (Kind.CLOSE, "code", "two words"),
        (Kind.CLOSE, "code", "done\n"),
        (Kind.CLOSE, "code", "a" * 41),
        (Kind.CLOSE, "message", "a" * (MAX_REASON_CHARS + 1)),
        (Kind.CLOSE, "message", b"bytes"),
    ],
)
def test_fields_out_of_bounds_are_refused(kind: Kind, name: str, value: object) -> None:
    with pytest.raises(EnvelopeError, match=kind.name):
        parse(message(kind, EXAMPLES[kind] | {name: value}))


def test_we_cannot_send_what_others_may_not() -> None:
    with pytest.raises(ValidationError):
        Data(session=SESSION, sequence=-1)


def test_an_error_shows_nothing_of_the_message() -> None:
    secret = "a secret that does not belong in a log"
    with pytest.raises(EnvelopeError) as error:
        parse(message(Kind.CLOSE, {"code": secret, "message": secret}))
    assert "secret" not in str(error.value)
    assert error.value.__cause__ is None


sessions = st.binary(min_size=16, max_size=16)
digests = st.binary(min_size=32, max_size=32)
versions = st.integers(-(2**63), 2**64 - 1)
seconds = st.floats(min_value=0.001, max_value=3600)
headers = st.one_of(
    st.builds(Hello, version=versions, role=st.sampled_from(["client", "server"]), identity=st.none() | digests),
    st.builds(Welcome, version=versions, heartbeat_s=seconds, timeout_s=seconds),
    st.just(Ping()),
    st.just(Pong()),
    st.builds(Open, version=versions, session=sessions, server=digests, job=digests),
    st.builds(Accept, session=sessions),
    st.builds(Data, session=sessions, sequence=st.integers(0, 2**63 - 1)),
    st.builds(
        Close,
        session=st.none() | sessions,
        code=st.from_regex(r"[a-z_]{1,40}", fullmatch=True),
        message=st.text(max_size=MAX_REASON_CHARS),
    ),
)


@settings(max_examples=100, deadline=None)
@given(header=headers, bodies=st.lists(st.binary(max_size=20), min_size=1, max_size=5))
def test_any_message_survives_the_wire(header: Header, bodies: list[bytes]) -> None:
    body: list[Frame] = [*bodies] if type(header) in WITH_BODY else []
    packed = pack(header, body)
    parsed = parse(packed.frames())
    assert parsed.header == header
    assert list(parsed.body) == body
    assert associated_data(parsed) == associated_data(packed)


raw_frames = st.lists(st.binary(max_size=60), max_size=5)
almost = st.tuples(
    st.sampled_from([kind.value for kind in Kind]),
    st.one_of(
        st.binary(max_size=60),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary() | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=6,
        ).map(msgpack.packb),
    ),
    st.binary(max_size=4),
).map(list)
changed = st.tuples(st.sampled_from(list(Kind)), st.integers(0, 200), st.integers(0, 255)).map(
    lambda how: change(message(how[0], EXAMPLES[how[0]]), how[1], how[2])
)


def change(frames: list[Frame], place: int, value: int) -> list[Frame]:
    """One byte of the header replaced."""
    raw = bytearray(frames[1])
    raw[place % len(raw)] = value
    return [frames[0], bytes(raw), *frames[2:]]


@settings(max_examples=500, deadline=None)
@given(frames=st.one_of(raw_frames, almost, changed))
def test_whatever_comes_is_parsed_or_refused_by_a_typed_error(frames: list[Frame]) -> None:
    try:
        envelope = parse(frames)
    except (FrameError, EnvelopeError):
        return
    assert envelope.frames() == frames
