"""A worker's connection to one broker: one DEALER socket, greeting and heartbeat. Owned by one thread."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Literal

import zmq
from zmq.utils.monitor import recv_monitor_message

from shared import PROTOCOL_VERSION
from shared.errors import ConnectionFailed, EnvelopeError, FrameError, HandshakeError
from shared.logs import event
from shared.wire.curve import Door, LinkKeys, use_as_worker
from shared.wire.envelope import Close, Envelope, Hello, Ping, Pong, Welcome, pack, parse
from shared.wire.heartbeat import Heartbeat

HIGH_WATER_MARK = 1024
LINGER_MS = 1000
POLL_MS = 50
# libzmq tries again after this long, then after twice as long, up to the maximum.
RECONNECT_MS = 100
RECONNECT_MAX_MS = 2000
# A peer that vanished without a word is noticed by TCP too: idle seconds, then probes a second apart.
KEEPALIVE_S = 10
MAX_MESSAGE_BYTES = 2**31
# How often a broker that has fallen silent is greeted anew.
GREET_S = 1.0

logger = logging.getLogger(__name__)


class BrokerConnection:
    """Greets the broker and keeps the connection alive; hands everything else to its owner.

    `hello` says who is greeting, `keys` are those of its link. `bytes_sent` and `bytes_received` count the body bytes
    of end-to-end messages.
    """

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", door: Door, hello: Hello, keys: LinkKeys | None = None
    ) -> None:
        self.door = door
        self.hello = hello
        self.keys = keys
        self.socket = context.socket(zmq.DEALER)
        self.heartbeat: Heartbeat | None = None
        self.bytes_sent = 0
        self.bytes_received = 0
        self._greeted_at = 0.0
        self._trouble: zmq.Socket[bytes] | None = None

    @property
    def address(self) -> str:
        return self.door.address

    @property
    def up(self) -> bool:
        """Whether the broker has answered, and not fallen silent since."""
        return self.heartbeat is not None

    def __enter__(self) -> "BrokerConnection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_watching()
        self.socket.close(LINGER_MS)

    def start(self) -> None:
        """Connect and greet, without waiting. Raises ConnectionFailed, UsageError for a plain link to elsewhere."""
        for option, value in (
            (zmq.SNDHWM, HIGH_WATER_MARK),
            (zmq.RCVHWM, HIGH_WATER_MARK),
            (zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES),
            (zmq.RECONNECT_IVL, RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS),
            (zmq.TCP_KEEPALIVE, 1),
            (zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_S),
            (zmq.TCP_KEEPALIVE_INTVL, 1),
        ):
            self.socket.setsockopt(option, value)
        use_as_worker(self.socket, self.keys, self.door)
        self._trouble = self.socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        )
        try:
            self.socket.connect(self.address)
        except zmq.ZMQError as error:
            raise ConnectionFailed(f"cannot connect to a broker at {self.address}: {error.strerror}") from None
        self._greet(time.monotonic())

    def open(self, timeout_s: float, cancelled: Callable[[], bool] = lambda: False) -> None:
        """`start`, and wait for the broker's greeting. Raises ConnectionFailed after `timeout_s`, or when cancelled.

        It greets again meanwhile: a broker that dies may have heard the first greeting, and another be in its place.
        """
        self.start()
        deadline = time.monotonic() + timeout_s
        while not self.socket.poll(POLL_MS):
            if cancelled():
                raise ConnectionFailed("stopped while waiting for the broker")
            self.check_door()
            if (now := time.monotonic()) < deadline:
                self.greet_again(now)
                continue
            raise ConnectionFailed(
                f"no broker answers at {self.address} (waited {timeout_s:g} s)",
                hint="start it with 'flglm broker', or check address, firewall and the broker's key",
            )
        envelope = parse(self.socket.recv_multipart())
        if isinstance(envelope.header, Close):
            raise ConnectionFailed(f"the broker at {self.address} refused: {envelope.header.message}")
        if not isinstance(envelope.header, Welcome):
            raise ConnectionFailed(f"what answers at {self.address} is not an flglm broker")
        self._welcomed(envelope.header)

    def check_door(self) -> None:
        """Raises HandshakeError or ConnectionFailed if the link's handshake has failed since the last look."""
        while self._trouble is not None and self._trouble.poll(0):
            failure = recv_monitor_message(self._trouble)["event"]
            if failure == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise HandshakeError(
                    f"the broker at {self.address} does not admit this key",
                    hint="send your card to the broker's operator, who types flglm admit",
                )
            if failure == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                raise ConnectionFailed(
                    f"what answers at {self.address} speaks another security protocol",
                    hint="broker and workers are all started with keys, or all with --plain",
                )

    def send(self, envelope: Envelope) -> None:
        """Raises ConnectionFailed if the queue towards the broker is full."""
        self.bytes_sent += sum(memoryview(frame).nbytes for frame in envelope.body)
        try:
            self.socket.send_multipart(envelope.frames(), zmq.DONTWAIT, copy=False)
        except zmq.Again:
            raise ConnectionFailed(f"the broker at {self.address} takes no more messages") from None

    def receive(self, now: float) -> Envelope | None:
        """The next message for the owner, if one is here; greetings, heartbeats and garbage are dealt with inside."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return None
            if self.heartbeat is not None:
                self.heartbeat.heard(now)
            try:
                envelope = parse([frame.buffer for frame in frames])
            except (FrameError, EnvelopeError) as error:
                event(logger, "message_refused", level=logging.WARNING, code=error.code, reason=error.message)
                continue
            if isinstance(envelope.header, Welcome):
                self._welcomed(envelope.header)
            elif not isinstance(envelope.header, Pong):
                self.bytes_received += sum(memoryview(frame).nbytes for frame in envelope.body)
                return envelope

    def received(self, now: float) -> Iterator[Envelope]:
        """All that is here."""
        while (envelope := self.receive(now)) is not None:
            yield envelope

    def tick(self, now: float) -> None:
        """Send a PING when one is due. Raises ConnectionFailed when the broker has been silent too long."""
        if self.heartbeat is None:
            return
        if self.heartbeat.expired(now):
            raise ConnectionFailed(
                f"the broker at {self.address} fell silent", hint="start it again, then run the same command to resume"
            )
        if self.heartbeat.ping_due(now):
            self._say(Ping())

    def greet_again(self, now: float) -> None:
        """For a broker that is not there (any more): greet it, now and then, until it answers."""
        self.heartbeat = None
        if now - self._greeted_at >= GREET_S:
            self._greet(now)

    def close_politely(self) -> None:
        """Tell the broker that this worker leaves."""
        self.send(pack(Close(code="leaving", message="the worker leaves")))

    def _greet(self, now: float) -> None:
        self._greeted_at = now
        self._say(self.hello)

    def _say(self, header: Hello | Ping) -> None:
        # A full queue means that the broker is away: libzmq keeps what it has, and the next PING or HELLO is soon due.
        with contextlib.suppress(zmq.Again):
            self.socket.send_multipart(pack(header).frames(), zmq.DONTWAIT)

    def _welcomed(self, welcome: Welcome) -> None:
        self.heartbeat = Heartbeat(welcome.heartbeat_s, welcome.timeout_s, time.monotonic())
        self._stop_watching()

    def _stop_watching(self) -> None:
        if self._trouble is not None:
            self.socket.disable_monitor()
            self._trouble.close(0)
            self._trouble = None


def hello(
    role: Literal["client", "server"], identity: bytes | None = None, replica: int = 0, replicas: int = 1
) -> Hello:
    return Hello(version=PROTOCOL_VERSION, role=role, identity=identity, replica=replica, replicas=replicas)
