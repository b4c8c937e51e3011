"""Frames and routing headers: the only place that knows their order.

A message between a worker and the broker is

    frame 0    kind, one byte
    frame 1    header, a msgpack map, one schema a kind
    frame 2..  body: opaque bytes (a handshake message or the sealed frames of a record)

The bytes of frames 0 and 1 are authenticated with the body (`associated_data`), so a broker that changes, say, a
sequence number is found out. docs/protocol.md is the authoritative description.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Literal, Self

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shared.errors import EnvelopeError, FrameError

MAX_HEADER_BYTES = 1024
MAX_BODY_FRAMES = 4096
MAX_REASON_CHARS = 200  # of 4 bytes in UTF-8 at most, so that the header fits
MAX_SECONDS = 3600

SessionId = Annotated[bytes, Field(min_length=16, max_length=16)]
Digest = Annotated[bytes, Field(min_length=32, max_length=32)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
SequenceNumber = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]

Frame = bytes | bytearray | memoryview


class Kind(bytes, Enum):
    """Frame 0. Worker and broker: HELLO, WELCOME, PING, PONG. End to end: OPEN, ACCEPT, DATA. Either: CLOSE."""

    HELLO = b"H"
    WELCOME = b"W"
    PING = b"P"
    PONG = b"Q"
    OPEN = b"O"
    ACCEPT = b"A"
    DATA = b"D"
    CLOSE = b"C"


class Header(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Hello(Header):
    """A worker's first message. A server says its identity, which clients name; replicas share one, by number."""

    version: int
    role: Literal["client", "server"]
    identity: Digest | None = None
    replica: Annotated[int, Field(ge=0, lt=4096)] = 0
    replicas: Annotated[int, Field(ge=1, le=4096)] = 1

    @model_validator(mode="after")
    def _counted_from_zero(self) -> Self:
        if self.replica >= self.replicas:
            raise ValueError("replica counts from 0 to replicas - 1")
        return self


class Welcome(Header):
    """The broker's answer to HELLO: how often to PING, and after how long a silent peer counts as gone (seconds)."""

    version: int
    heartbeat_s: Seconds
    timeout_s: Seconds


class Ping(Header):
    pass


class Pong(Header):
    pass


class Open(Header):
    """A client asks the server `server` for a session on the job with digest `job`. Body: handshake message 1.

    The whole header is the handshake's prologue.
    """

    version: int
    session: SessionId
    server: Digest
    job: Digest


class Accept(Header):
    """The server's answer. Body: handshake message 2."""

    session: SessionId


class Data(Header):
    """One sealed record. `sequence` counts records of this session in this direction from 0."""

    session: SessionId
    sequence: SequenceNumber


class Close(Header):
    """The session (or, without one, the connection) has ended or was refused. Not authenticated: a hint."""

    session: SessionId | None = None
    code: Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")]
    message: Annotated[str, Field(max_length=MAX_REASON_CHARS)]


SCHEMAS: dict[Kind, type[Header]] = {
    Kind.HELLO: Hello,
    Kind.WELCOME: Welcome,
    Kind.PING: Ping,
    Kind.PONG: Pong,
    Kind.OPEN: Open,
    Kind.ACCEPT: Accept,
    Kind.DATA: Data,
    Kind.CLOSE: Close,
}
KINDS: dict[type[Header], Kind] = {schema: kind for kind, schema in SCHEMAS.items()}
BY_BYTE: dict[bytes, Kind] = {kind.value: kind for kind in Kind}
WITH_BODY = frozenset({Open, Accept, Data})


@dataclass(frozen=True)
class Envelope:
    """A parsed message: its header (whose type says its kind), the two frames as they came, and the body frames."""

    header: Header
    raw_header: bytes
    body: Sequence[Frame] = ()

    def frames(self) -> list[Frame]:
        """The frames in wire order; the header's bytes as they came, so that seals stay valid when forwarded."""
        return [KINDS[type(self.header)].value, self.raw_header, *self.body]


def pack(header: Header, body: Sequence[Frame] = ()) -> Envelope:
    return Envelope(header, msgpack.packb(header.model_dump()), body)


def associated_data(envelope: Envelope) -> bytes:
    """The bytes that a seal binds: kind, header, and the number of body frames."""
    kind = KINDS[type(envelope.header)].value
    return kind + len(envelope.body).to_bytes(4, "big") + envelope.raw_header


def parse(frames: Sequence[Frame]) -> Envelope:
    """Check number and sizes of the frames, then the kind, then the header.

    Raises FrameError or EnvelopeError; has no effect otherwise.
    """
    if len(frames) < 2:
        raise FrameError(f"a message has at least 2 frames, got {len(frames)}")
    if len(frames) - 2 > MAX_BODY_FRAMES:
        raise FrameError(f"a message has at most {MAX_BODY_FRAMES} body frames, got {len(frames) - 2}")
    if len(frames[1]) > MAX_HEADER_BYTES:
        raise FrameError(f"a header has at most {MAX_HEADER_BYTES} bytes, got {len(frames[1])}")
    if len(frames[0]) != 1:
        raise FrameError(f"frame 0 is one byte, got {len(frames[0])}")
    kind = BY_BYTE.get(bytes(frames[0]))
    if kind is None:
        raise EnvelopeError("unknown kind of message")
    raw_header = bytes(frames[1])
    schema = SCHEMAS[kind]
    try:
        header = schema.model_validate(msgpack.unpackb(raw_header, strict_map_key=True))
    except (ValueError, ValidationError, msgpack.UnpackException) as error:
        raise EnvelopeError(f"a {kind.name} header that breaks its schema ({type(error).__name__})") from None
    body = frames[2:]
    if body and schema not in WITH_BODY:
        raise FrameError(f"{kind.name} carries no body, got {len(body)} frames")
    if not body and schema in WITH_BODY:
        raise FrameError(f"{kind.name} needs a body")
    return Envelope(header, raw_header, body)
