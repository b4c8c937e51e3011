"""Who is connected, which session belongs to whom, and what becomes of each message: the broker without its sockets.

Rules
- A worker greets with HELLO and is answered with WELCOME; who has not gets `unknown_peer` for anything else.
- Behind a guarded door every message comes with the guest who sent it: a connection belongs to one guest for good, and
  a server to the one whose key it names (`not_admitted`). Without guests the door is plain.
- A server gives its identity and its number among the replicas that share it. If it connects anew, the old connection
  and its sessions end.
- OPEN pins a session to the client that sent it and the server that it names, of whose replicas, once all are there,
  the one with the fewest sessions. ACCEPT comes from that server; DATA from either end goes to the other, its frames
  untouched. A session's messages from anybody else are refused, the session undisturbed (`not_yours`).
- CLOSE from one end of a session ends it and goes to the other; CLOSE without a session ends the connection.
- A worker silent for `timeout_s` is gone: the other ends of its sessions are told.
- What breaks a rule is answered with CLOSE, counted, and changes nothing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from broker.guard import Guest, Side
from broker.settings import BrokerSettings
from shared import PROTOCOL_VERSION
from shared.errors import EnvelopeError, FrameError
from shared.wire.envelope import (
    MAX_REASON_CHARS,
    Accept,
    Close,
    Data,
    Envelope,
    Frame,
    Hello,
    Open,
    Ping,
    Pong,
    Welcome,
    pack,
    parse,
)

# After so many intervals without a PING the broker looks whether the connection is still open.
LATE_PINGS = 1.5

UP, DOWN = ("messages_up", "bytes_up"), ("messages_down", "bytes_down")


class Peer(NamedTuple):
    """A connection: which socket, and ROUTER's name for it."""

    side: Side
    id: bytes


class Send(NamedTuple):
    to: Peer
    envelope: Envelope


@dataclass
class Connected:
    """What is known of a greeted peer."""

    heard: float
    identity: bytes | None = None
    replica: int = 0
    replicas: int = 1
    guest: Guest | None = None
    sessions: set[bytes] = field(default_factory=set)


@dataclass
class Session:
    """`unanswered`: messages of the client since the server's last."""

    client: Peer
    server: Peer
    unanswered: int = 0

    def other(self, peer: Peer) -> Peer:
        return self.server if peer == self.client else self.client


class Router:
    """The state machine: messages and time in, messages to send out."""

    def __init__(self, settings: BrokerSettings) -> None:
        self.settings = settings
        self.peers: dict[Peer, Connected] = {}
        self.servers: dict[bytes, dict[int, Peer]] = {}
        self.sessions: dict[bytes, Session] = {}
        self.connections: Counter[Guest | None] = Counter()
        self.counters: Counter[str] = Counter()

    def handle(self, peer: Peer, frames: Sequence[Frame], now: float, guest: Guest | None = None) -> list[Send]:
        """What to send because of this message, of `guest` behind a guarded door."""
        try:
            envelope = parse(frames)
        except (FrameError, EnvelopeError) as error:
            return [self._refuse(peer, None, error.code, error.message)]
        header = envelope.header
        if isinstance(header, Hello):
            return self._hello(peer, header, now, guest)
        known = self.peers.get(peer)
        if known is None or known.guest != guest:
            return [self._refuse(peer, None, "unknown_peer", "say HELLO first")]
        known.heard = now
        if isinstance(header, Ping):
            return [Send(peer, pack(Pong()))]
        if isinstance(header, Open):
            return self._open(peer, envelope, header)
        if isinstance(header, Accept | Data):
            return self._forward(peer, envelope, header)
        if isinstance(header, Close):
            return self._close(peer, envelope, header)
        return [self._refuse(peer, None, "envelope", "a message that only a broker sends")]

    def tick(self, now: float) -> list[Send]:
        """End the connections of those who have been silent too long, and knock where a PING is overdue.

        Only by sending does ZeroMQ tell that a connection is closed: whoever was killed is missed then, not at the
        timeout.
        """
        silence = {peer: now - known.heard for peer, known in self.peers.items()}
        sends: list[Send] = []
        for peer, silent_s in silence.items():
            if silent_s > self.settings.timeout_s:
                sends += self.expel(peer, "timed_out", "silent for too long")
            elif silent_s > LATE_PINGS * self.settings.heartbeat_s:
                sends.append(Send(peer, pack(Pong())))
        return sends

    def lost(self, peer: Peer) -> list[Send]:
        """A peer is gone: forget it and tell the other ends of its sessions."""
        known = self.peers.pop(peer, None)
        if known is None:
            return []
        self.counters["peers_gone"] += 1
        self.connections[known.guest] -= 1
        if not self.connections[known.guest]:
            del self.connections[known.guest]
        if known.identity is not None:
            replicas = self.servers[known.identity]
            del replicas[known.replica]
            if not replicas:
                del self.servers[known.identity]
        code = f"{peer.side}_gone"
        sends = []
        for session_id in sorted(known.sessions):
            other = self._end(session_id).other(peer)
            sends.append(_closing(other, session_id, code, f"the {peer.side} is gone"))
        return sends

    def expel(self, peer: Peer, code: str, reason: str) -> list[Send]:
        """End a peer's connection and say why."""
        return [*self.lost(peer), self._refuse(peer, None, code, reason)]

    def undeliverable(self, send: Send) -> list[Send]:
        """A peer's queue is full: end the session concerned, and tell the one who sent. Nobody else waits."""
        session_id = getattr(send.envelope.header, "session", None)
        session = None if session_id is None else self.sessions.get(session_id)
        if session is None or session_id is None:
            return []
        self.counters["refused_peer_too_slow"] += 1
        self._end(session_id)
        return [_closing(session.other(send.to), session_id, "peer_too_slow", "the other end does not keep up")]

    def _hello(self, peer: Peer, hello: Hello, now: float, guest: Guest | None) -> list[Send]:
        if hello.version != PROTOCOL_VERSION:
            text = f"this broker speaks protocol {PROTOCOL_VERSION}, the worker {hello.version}"
            return [self._refuse(peer, None, "version", text)]
        if hello.role != peer.side or (hello.role == "server") != (hello.identity is not None):
            return [self._refuse(peer, None, "wrong_side", f"a {hello.role} on the {peer.side}s' address")]
        if guest is not None and hello.identity not in (None, guest.identity):
            return [self._refuse(peer, None, "not_admitted", "a server greets with another identity than its own")]
        known = self.peers.get(peer)
        if known is None and len(self.peers) >= self.settings.max_peers:
            return [self._refuse(peer, None, "too_many_peers", "no room for another connection")]
        if known is not None and known.guest != guest:
            return [self._refuse(peer, None, "not_admitted", "this connection is somebody else's")]
        if known is None and guest is not None and self.connections[guest] >= self.settings.max_connections_per_worker:
            return [self._refuse(peer, None, "too_many_peers", "this worker has too many connections")]
        sends = self.lost(peer) if peer in self.peers else []
        if hello.identity is not None:
            before = self.servers.get(hello.identity, {}).get(hello.replica)
            sends += [] if before is None else self.lost(before)
            self.servers.setdefault(hello.identity, {})[hello.replica] = peer
        self.connections[guest] += 1
        self.peers[peer] = Connected(now, hello.identity, hello.replica, hello.replicas, guest)
        welcome = Welcome(
            version=PROTOCOL_VERSION, heartbeat_s=self.settings.heartbeat_s, timeout_s=self.settings.timeout_s
        )
        return [*sends, Send(peer, pack(welcome))]

    def _open(self, peer: Peer, envelope: Envelope, header: Open) -> list[Send]:
        if peer.side != "client":
            return [self._refuse(peer, header.session, "not_yours", "only clients open sessions")]
        if header.session in self.sessions:
            return [self._refuse(peer, header.session, "session_in_use", "a session of that id is open")]
        replicas = self.servers.get(header.server)
        if replicas is None:
            return [self._refuse(peer, header.session, "no_such_server", "the server is not connected to this broker")]
        expected = max(self.peers[replica].replicas for replica in replicas.values())
        if len(replicas) < expected:  # sessions stay where they are: the first replica would get them all
            text = f"{len(replicas)} of the server's {expected} replicas are connected to this broker"
            return [self._refuse(peer, header.session, "no_such_server", text)]
        mine = self.peers[peer].sessions
        if len(mine) >= self.settings.max_sessions_per_client:
            return [self._refuse(peer, header.session, "too_many_sessions", "this client has too many sessions open")]
        _, server = min(replicas.items(), key=lambda item: (len(self.peers[item[1]].sessions), item[0]))
        self.sessions[header.session] = Session(peer, server)
        mine.add(header.session)
        self.peers[server].sessions.add(header.session)
        return [self._pass_on(server, envelope)]

    def _forward(self, peer: Peer, envelope: Envelope, header: Accept | Data) -> list[Send]:
        session = self.sessions.get(header.session)
        if session is None:
            return [self._refuse(peer, header.session, "unknown_session", "there is no such session: open a new one")]
        if peer not in (session.client, session.server) or (isinstance(header, Accept) and peer != session.server):
            return [self._refuse(peer, header.session, "not_yours", "the session is not yours")]
        if peer == session.server:
            session.unanswered = 0
        else:
            session.unanswered += 1
            if session.unanswered > self.settings.max_unanswered:
                return self._flooded(header.session)
        return [self._pass_on(session.other(peer), envelope)]

    def _flooded(self, session_id: bytes) -> list[Send]:
        """One client must not fill the queue towards the server, in which all others' messages wait too."""
        session = self._end(session_id)
        text = f"more than {self.settings.max_unanswered} messages without an answer"
        self.counters["refused_too_many_unanswered"] += 1
        return [
            _closing(session.client, session_id, "too_many_unanswered", text),
            _closing(session.server, session_id, "client_gone", "the client sent too much"),
        ]

    def _close(self, peer: Peer, envelope: Envelope, header: Close) -> list[Send]:
        if header.session is None:
            return self.lost(peer)
        session = self.sessions.get(header.session)
        if session is None or peer not in (session.client, session.server):
            self.counters["refused_not_yours"] += 1
            return []
        self._end(header.session)
        return [Send(session.other(peer), envelope)]

    def _pass_on(self, to: Peer, envelope: Envelope) -> Send:
        messages, size = UP if to.side == "server" else DOWN
        self.counters[messages] += 1
        self.counters[size] += sum(map(len, envelope.body))
        return Send(to, envelope)

    def _end(self, session_id: bytes) -> Session:
        session = self.sessions.pop(session_id)
        for peer in (session.client, session.server):
            if peer in self.peers:
                self.peers[peer].sessions.discard(session_id)
        return session

    def _refuse(self, peer: Peer, session: bytes | None, code: str, message: str) -> Send:
        self.counters[f"refused_{code}"] += 1
        return _closing(peer, session, code, message)


def _closing(to: Peer, session: bytes | None, code: str, message: str) -> Send:
    return Send(to, pack(Close(session=session, code=code, message=message[:MAX_REASON_CHARS])))
