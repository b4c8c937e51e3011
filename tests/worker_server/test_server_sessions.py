"""The server's sessions without sockets: who is let in, who is not, and that a refusal leaves nothing behind."""

import os
from collections.abc import Callable, Mapping

import pytest

from shared import PROTOCOL_VERSION
from shared.errors import FlglmError, HandshakeError, KeyFileError, Refused, ReplayError, SchemaError, SealError
from shared.identity import generate_identity, key_digest
from shared.payload.messages import Confirm, Leave, Refusal, pack, unpack_from_server
from shared.secure.handshake import ClientHandshake
from shared.secure.records import Channel
from shared.wire.envelope import Data, Envelope, Open
from shared.wire.envelope import pack as pack_envelope
from worker_server.sessions import Sessions, code_of

SERVER = generate_identity("server")
ANNA = generate_identity("anna")
STRANGER = generate_identity("anna")
JOB = b"j" * 32


def sessions(limit: int = 4, admitted: Callable[[], Mapping[bytes, str]] | None = None) -> Sessions:
    return Sessions(SERVER.private, admitted or (lambda: {ANNA.public: "anna"}), JOB, limit)


def greeting(
    version: int = PROTOCOL_VERSION, job: bytes = JOB, session: bytes | None = None, stranger: bool = False
) -> tuple[ClientHandshake, Envelope]:
    header = Open(version=version, session=session or os.urandom(16), server=key_digest(SERVER.public), job=job)
    handshake = ClientHandshake((STRANGER if stranger else ANNA).private, SERVER.public, header)
    return handshake, pack_envelope(header, [handshake.message_1])


def opened(mine: Sessions, session: bytes | None = None) -> tuple[Channel, Envelope]:
    """A session of Anna's: her channel, and the OPEN that made it."""
    handshake, envelope = greeting(session=session)
    _, accept = mine.open(envelope, 0.0)
    channel, _ = handshake.finish(bytes(accept.body[0]))
    return channel, envelope


def refused(mine: Sessions, envelope: Envelope) -> str:
    before = [session.id for session in mine]
    with pytest.raises(FlglmError) as error:
        mine.open(envelope, 0.0)
    assert [session.id for session in mine] == before
    return code_of(error.value)


def test_an_admitted_client_gets_a_session_in_its_name() -> None:
    mine = sessions()
    channel, envelope = opened(mine)
    assert isinstance(envelope.header, Open)
    session = mine.get(envelope.header.session)
    assert session is not None
    assert (session.client, session.confirmed) == ("anna", False)
    _, message, frames = mine.read(channel.seal(pack(Confirm())))
    assert message == Confirm()
    assert frames == []
    assert session.confirmed
    refusal = Refusal(code="seal", message="no")
    assert unpack_from_server(channel.open(session.seal(refusal))) == (refusal, [])
    assert mine.close(session.id) is session
    assert session.id not in mine
    assert mine.close(session.id) is None


def test_another_protocol_version_is_refused() -> None:
    assert refused(sessions(), greeting(version=PROTOCOL_VERSION + 1)[1]) == "version"


def test_another_job_is_refused() -> None:
    assert refused(sessions(), greeting(job=b"k" * 32)[1]) == "job_differs"


def test_a_session_is_opened_once() -> None:
    mine = sessions()
    _, envelope = opened(mine)
    assert refused(mine, envelope) == "session_in_use"


def test_there_is_room_for_so_many_sessions() -> None:
    mine = sessions(limit=2)
    opened(mine)
    opened(mine)
    assert refused(mine, greeting()[1]) == "too_many_sessions"
    mine.close(next(iter(mine)).id)
    opened(mine)


def test_a_key_that_is_not_admitted_is_refused_whatever_its_name() -> None:
    assert refused(sessions(), greeting(stranger=True)[1]) == "unknown_client"


def test_unreadable_admissions_admit_nobody_and_tell_nobody_which_file() -> None:
    def unreadable() -> Mapping[bytes, str]:
        raise KeyFileError("clients/berta.card: not JSON")

    with pytest.raises(Refused, match="cannot tell whom it admits") as error:
        sessions(admitted=unreadable).open(greeting()[1], 0.0)
    assert error.value.reason == "unknown_client"
    assert "berta" not in error.value.message


def test_a_changed_greeting_does_not_authenticate() -> None:
    mine = sessions()
    _, envelope = greeting()
    changed = bytearray(envelope.body[0])
    changed[-1] ^= 1
    assert refused(mine, Envelope(envelope.header, envelope.raw_header, [changed])) == "handshake"
    other = greeting()[1]
    assert refused(mine, Envelope(other.header, other.raw_header, envelope.body)) == "handshake"
    with pytest.raises(HandshakeError, match="one body frame"):
        mine.open(Envelope(envelope.header, envelope.raw_header, [*envelope.body] * 2), 0.0)
    mine.open(envelope, 0.0)


def test_a_replayed_greeting_makes_nothing_that_lasts() -> None:
    mine = sessions()
    channel, envelope = opened(mine)
    assert isinstance(envelope.header, Open)
    record = channel.seal(pack(Confirm()))
    mine.read(record)
    mine.close(envelope.header.session)

    replayed, _ = mine.open(envelope, 100.0)
    with pytest.raises(SealError):
        mine.read(record)
    assert not replayed.confirmed
    assert mine.silent(before=100.0) == []
    assert mine.silent(before=100.5) == [replayed]


def test_who_has_spoken_is_not_silent() -> None:
    mine = sessions()
    channel, _ = opened(mine)
    mine.read(channel.seal(pack(Confirm())))
    assert mine.silent(before=1e9) == []


def test_what_does_not_open_or_is_no_clients_message_is_refused() -> None:
    mine = sessions()
    channel, envelope = opened(mine)
    assert isinstance(envelope.header, Open)
    session = mine.get(envelope.header.session)
    assert session is not None

    with pytest.raises(SealError, match="no session here"):
        mine.read(pack_envelope(Data(session=b"?" * 16, sequence=0), [b"x" * 32]))
    with pytest.raises(SealError):
        mine.read(pack_envelope(Data(session=session.id, sequence=0), [b"x" * 32]))
    assert not session.confirmed

    with pytest.raises(SchemaError):
        mine.read(channel.seal([b"\xc1"]))
    with pytest.raises(SchemaError):
        mine.read(channel.seal(pack(Leave(), [b"a tensor that nobody announced"])))
    record = channel.seal(pack(Leave()))
    assert mine.read(record)[1] == Leave()
    with pytest.raises(ReplayError):
        mine.read(record)


def test_the_code_of_a_refusal_is_its_reason() -> None:
    assert code_of(Refused("no", reason="too_long")) == "too_long"
    assert code_of(SealError("no")) == "seal"
