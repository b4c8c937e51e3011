"""The server's sessions: handshakes, records, and which client is behind each. No sockets, no model."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shared import PROTOCOL_VERSION
from shared.errors import FlglmError, KeyFileError, Refused, SealError
from shared.logs import event
from shared.payload.messages import FromClient, Message, pack, unpack_from_client
from shared.secure.handshake import ServerHandshake
from shared.secure.records import Channel
from shared.wire.envelope import Accept, Data, Envelope, Frame, Open
from shared.wire.envelope import pack as pack_envelope

logger = logging.getLogger(__name__)


@dataclass
class Session:
    """One client's session. `confirmed`: a record of it has opened, so the client is really there, now.

    `joined`: it has come to train. Others look and go, and the job goes on as if they had not been there.
    `unanswered`: when requests for the trunk came that wait for their answers, by number.
    """

    id: bytes
    client: str
    public: bytes
    channel: Channel
    opened_at: float
    confirmed: bool = False
    joined: bool = False
    unanswered: dict[int, float] = field(default_factory=dict)

    def seal(self, message: Message, tensors: Sequence[Frame] = ()) -> Envelope:
        return self.channel.seal(pack(message, tensors))


class Sessions:
    """All sessions, at most `limit`, for the job with digest `job`."""

    def __init__(
        self, static: X25519PrivateKey, admitted: Callable[[], Mapping[bytes, str]], job: bytes, limit: int
    ) -> None:
        self.static = static
        self.admitted = admitted
        self.job = job
        self.limit = limit
        self._sessions: dict[bytes, Session] = {}

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def __contains__(self, session: bytes) -> bool:
        return session in self._sessions

    def get(self, session: bytes) -> Session | None:
        return self._sessions.get(session)

    def open(self, envelope: Envelope, now: float) -> tuple[Session, Envelope]:
        """Answer an OPEN: the new session and its ACCEPT. Raises Refused or HandshakeError; nothing is kept then."""
        header = envelope.header
        assert isinstance(header, Open)
        if header.version != PROTOCOL_VERSION:
            raise Refused(
                f"the client speaks protocol {header.version}, the server {PROTOCOL_VERSION}", reason="version"
            )
        if header.job != self.job:
            raise Refused(
                "the invitation is for another job, or another version of it, than this server runs",
                reason="job_differs",
            )
        if header.session in self._sessions:
            raise Refused("this session is open already", reason="session_in_use")
        if len(self._sessions) >= self.limit:
            raise Refused("the server has no room for another session", reason="too_many_sessions")
        handshake = ServerHandshake(self.static, lambda public: self.admitted().get(public))
        try:
            client, public = handshake.receive(envelope)
        except KeyFileError as error:
            # Which file is wrong is for the operator's log, not for whoever knocks.
            event(logger, "admissions_unreadable", level=logging.ERROR, reason=error.message)
            raise Refused("the server cannot tell whom it admits", reason="unknown_client") from None
        message_2, channel = handshake.accept()
        session = Session(header.session, client, public, channel, now)
        self._sessions[session.id] = session
        return session, pack_envelope(Accept(session=session.id), [message_2])

    def read(self, envelope: Envelope) -> tuple[Session, FromClient, Sequence[Frame]]:
        """Open a record and its message. Raises SealError (or a subclass) or SchemaError; nothing changes then."""
        header = envelope.header
        assert isinstance(header, Data)
        session = self._sessions.get(header.session)
        if session is None:
            raise SealError("a record of no session here")
        frames = session.channel.open(envelope)
        session.confirmed = True
        message, tensors = unpack_from_client(frames)
        return session, message, tensors

    def close(self, session: bytes) -> Session | None:
        return self._sessions.pop(session, None)

    def revoked(self) -> list[Session]:
        """Sessions whose client is admitted no more. None as long as the list cannot be read."""
        try:
            admitted = self.admitted()
        except KeyFileError as error:
            event(logger, "admissions_unreadable", level=logging.ERROR, reason=error.message)
            return []
        return [s for s in self._sessions.values() if admitted.get(s.public) != s.client]

    def names(self) -> frozenset[str] | None:
        """The clients that are admitted now; None as long as the list cannot be read."""
        try:
            return frozenset(self.admitted().values())
        except KeyFileError:
            return None  # `revoked` has said so

    def silent(self, before: float) -> list[Session]:
        """Sessions opened before `before` from which no record has come."""
        return [s for s in self._sessions.values() if not s.confirmed and s.opened_at < before]


def code_of(error: FlglmError) -> str:
    """What travels of an error: its code, or the reason of a refusal."""
    return error.reason if isinstance(error, Refused) else error.code
