"""A worker's connection to its broker: one DEALER socket, greeting and heartbeat. Owned by one thread."""

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal

import zmq

from shared import PROTOCOL_VERSION
from shared.errors import ConnectionFailed, EnvelopeError, FrameError
from shared.logs import event
from shared.wire.envelope import Close, Envelope, Hello, Ping, Pong, Welcome, pack, parse
from shared.wire.heartbeat import Heartbeat

HIGH_WATER_MARK = 1024
LINGER_MS = 1000
POLL_MS = 50
MAX_MESSAGE_BYTES = 2**31

logger = logging.getLogger(__name__)


class BrokerConnection:
    """Greets the broker and keeps the connection alive; hands everything else to its owner.

    `bytes_sent` and `bytes_received` count the body bytes of end-to-end messages.
    """

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        address: str,
        role: Literal["client", "server"],
        identity: bytes | None = None,
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        self.address = address
        self.role = role
        self.identity = identity
        self.replica = replica
        self.replicas = replicas
        self.socket = context.socket(zmq.DEALER)
        self.heartbeat: Heartbeat | None = None
        self.bytes_sent = 0
        self.bytes_received = 0

    def __enter__(self) -> "BrokerConnection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close(LINGER_MS)

    def open(self, timeout_s: float, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Connect and wait for the broker's greeting. Raises ConnectionFailed after `timeout_s`, or when cancelled."""
        self.socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self.socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        try:
            self.socket.connect(self.address)
        except zmq.ZMQError as error:
            raise ConnectionFailed(f"cannot connect to a broker at {self.address}: {error.strerror}") from None
        self._greet()
        deadline = time.monotonic() + timeout_s
        while not self.socket.poll(POLL_MS):
            if cancelled():
                raise ConnectionFailed("stopped while waiting for the broker")
            if time.monotonic() < deadline:
                continue
            raise ConnectionFailed(
                f"no broker answers at {self.address} (waited {timeout_s:g} s)",
                hint="start it with 'flglm broker', or check the address and the firewall",
            )
        envelope = parse(self.socket.recv_multipart())
        if isinstance(envelope.header, Close):
            raise ConnectionFailed(f"the broker at {self.address} refused: {envelope.header.message}")
        if not isinstance(envelope.header, Welcome):
            raise ConnectionFailed(f"what answers at {self.address} is not an flglm broker")
        self._welcomed(envelope.header)

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

    def tick(self, now: float) -> None:
        """Send a PING when one is due. Raises ConnectionFailed when the broker has been silent too long."""
        if self.heartbeat is None:
            return
        if self.heartbeat.expired(now):
            raise ConnectionFailed(
                f"the broker at {self.address} fell silent", hint="start it again, then run the same command to resume"
            )
        if self.heartbeat.ping_due(now):
            self.socket.send_multipart(pack(Ping()).frames(), zmq.DONTWAIT)

    def close_politely(self) -> None:
        """Tell the broker that this worker leaves."""
        self.send(pack(Close(code="leaving", message="the worker leaves")))

    def _greet(self) -> None:
        hello = Hello(
            version=PROTOCOL_VERSION,
            role=self.role,
            identity=self.identity,
            replica=self.replica,
            replicas=self.replicas,
        )
        self.socket.send_multipart(pack(hello).frames())

    def _welcomed(self, welcome: Welcome) -> None:
        self.heartbeat = Heartbeat(welcome.heartbeat_s, welcome.timeout_s, time.monotonic())
