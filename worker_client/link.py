"""The client's line to its server: one thread owns the socket, seals, opens and matches answers to requests."""

import logging
import os
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import zmq

from shared import PROTOCOL_VERSION
from shared.errors import ConnectionFailed, DeadlineExceeded, FlglmError, HandshakeError, PeerError, Refused
from shared.identity import Identity, key_digest
from shared.logs import event
from shared.payload.messages import Confirm, Leave, Message, Refusal, Welcome, pack, unpack_from_server
from shared.secure.handshake import ClientHandshake
from shared.secure.records import Channel
from shared.wire.connection import BrokerConnection, hello
from shared.wire.curve import Door
from shared.wire.envelope import Accept, Close, Data, Envelope, Frame, Open
from shared.wire.envelope import pack as pack_envelope
from shared.wire.waker import Waker

MAX_IN_FLIGHT = 64
POLL_MS = 250
RETRY_S = 0.5
RESUME = "run the same command to resume"
# Ends of a session after which another may be opened, as they say nothing against this client.
PASSING = (
    "server_gone", "server_stopping", "broker_stopping", "unknown_peer", "unknown_session", "round_undone", "timed_out",
    "peer_too_slow", "silent",
)  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """A server's message and its tensor frames."""

    message: Any
    frames: Sequence[Frame]


@dataclass(frozen=True)
class Call:
    message: Message
    frames: Sequence[Frame]
    answer: "Future[Answer]"


class Link:
    """A session with one server. A context manager: entering connects and shakes hands, leaving says goodbye.

    `server` is the server's public key, `job` the digest of the job that the invitation names.
    """

    def __init__(
        self,
        door: Door,
        identity: Identity,
        server: bytes,
        job: bytes,
        *,
        connect_timeout_s: float = 30.0,
        context: "zmq.Context[zmq.Socket[bytes]] | None" = None,
    ) -> None:
        self.identity = identity
        self.server = server
        self.job = job
        self.connect_timeout_s = connect_timeout_s
        self.session = os.urandom(16)
        self.connection = BrokerConnection(context or zmq.Context.instance(), door, hello("client"), identity.link)
        self.waker = Waker()
        self.outgoing: queue.Queue[Call] = queue.Queue(MAX_IN_FLIGHT)
        self.waiting: dict[int, Future[Answer]] = {}
        self.welcome: Future[Answer] = Future()
        self.failure: FlglmError | None = None
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._next_request = 0

    def __enter__(self) -> "Link":
        """Raises ConnectionFailed, HandshakeError or Refused; waits `connect_timeout_s` at most for each answer."""
        self.thread.start()
        try:
            self.wait(self.welcome, 2 * self.connect_timeout_s, "the server does not answer")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def next_request(self) -> int:
        """A fresh request number for a message's `request`."""
        self._next_request += 1
        return self._next_request

    def send(self, message: Message, frames: Sequence[Frame] = ()) -> "Future[Answer]":
        """Queue a request; its answer arrives in the future. Raises what ended the link."""
        if self.failure is not None:
            raise self.failure
        call = Call(message, frames, Future())
        try:
            self.outgoing.put_nowait(call)
        except queue.Full:
            raise ConnectionFailed(f"more than {MAX_IN_FLIGHT} requests wait to be sent") from None
        self.waker.wake()
        if self.failure is not None:  # the link ended just now, perhaps without seeing this call
            raise self.failure
        return call.answer

    def tell(self, message: Message) -> None:
        """Queue a message that is not answered. Does nothing where the link has ended: nobody is there to hear it."""
        if self.failure is None and not self.outgoing.full():
            self.outgoing.put_nowait(Call(message, (), Future()))
            self.waker.wake()

    def wait(self, answer: "Future[Answer]", timeout_s: float, what: str, hint: str = RESUME) -> Answer:
        """What `send` returned, when it is there. Raises Refused, DeadlineExceeded with `what`, ConnectionFailed."""
        try:
            return answer.result(timeout_s)
        except FutureTimeout:
            raise DeadlineExceeded(f"{what} (waited {timeout_s:g} s)", hint=hint) from None

    def _stop(self) -> None:
        self.closing.set()
        self.waker.wake()
        self.thread.join(2 * self.connect_timeout_s)
        self.waker.close()

    # The link's thread

    def _run(self) -> None:
        try:
            with self.connection:
                self.connection.open(self.connect_timeout_s, self.closing.is_set)
                self._serve(self._shake_hands())
        except FlglmError as error:
            self._fail(error)
        else:
            self._fail(ConnectionFailed("the link was closed"))

    def _shake_hands(self) -> Channel:
        header = Open(version=PROTOCOL_VERSION, session=self.session, server=key_digest(self.server), job=self.job)
        handshake = ClientHandshake(self.identity.private, self.server, header)
        greeting = pack_envelope(header, [handshake.message_1])
        self.connection.send(greeting)
        deadline = time.monotonic() + self.connect_timeout_s
        while (now := time.monotonic()) < deadline and not self.closing.is_set():
            self.connection.socket.poll(POLL_MS)
            envelope = self.connection.receive(now)
            self.connection.tick(now)
            if envelope is None:
                continue
            if isinstance(envelope.header, Close):
                if envelope.header.code != "no_such_server":
                    raise _refused(envelope.header)
                self.closing.wait(RETRY_S)  # the server may yet come: it loads its trunk before it connects
                self.connection.send(greeting)
            if isinstance(envelope.header, Accept) and envelope.header.session == self.session:
                channel, _ = handshake.finish(bytes(envelope.body[0]))
                return channel
        raise ConnectionFailed(
            f"the server is not at the broker, or does not answer (waited {self.connect_timeout_s:g} s)",
            hint="ask the operator whether it runs, then run the same command again",
        )

    def _serve(self, channel: Channel) -> None:
        poller = zmq.Poller()
        poller.register(self.connection.socket, zmq.POLLIN)
        poller.register(self.waker.reader, zmq.POLLIN)
        while True:
            poller.poll(POLL_MS)
            self.waker.drain()
            while not self.outgoing.empty():
                self._send(channel, self.outgoing.get_nowait())
            now = time.monotonic()
            while (envelope := self.connection.receive(now)) is not None:
                self._receive(channel, envelope)
            self.connection.tick(now)
            if self.closing.is_set() and self.outgoing.empty():
                self.connection.send(channel.seal(pack(Leave())))
                self.connection.close_politely()
                return

    def _send(self, channel: Channel, call: Call) -> None:
        request = getattr(call.message, "request", None)
        if request is not None:
            self.waiting[request] = call.answer
        self.connection.send(channel.seal(pack(call.message, call.frames)))

    def _receive(self, channel: Channel, envelope: Envelope) -> None:
        if isinstance(envelope.header, Close):
            raise _refused(envelope.header)
        if not isinstance(envelope.header, Data):
            return
        try:
            frames = channel.open(envelope)
            message, tensors = unpack_from_server(frames)
        except PeerError as error:
            # Forged or replayed by someone between: the real record still opens.
            event(logger, "message_refused", level=logging.WARNING, code=error.code, reason=error.message)
            return
        if isinstance(message, Welcome):
            if not self.welcome.done():
                self.connection.send(channel.seal(pack(Confirm())))
                self.welcome.set_result(Answer(message, tensors))
            return
        if isinstance(message, Refusal):
            self._refusal(message)
            return
        waiting = self.waiting.pop(message.request, None)
        if waiting is not None:
            waiting.set_result(Answer(message, tensors))

    def _refusal(self, refusal: Refusal) -> None:
        event(logger, "refused", level=logging.WARNING, code=refusal.code, reason=refusal.message)
        waiting = self.waiting.pop(refusal.request or 0, None)
        if waiting is not None:
            waiting.set_exception(Refused(f"the server refused: {refusal.message}", reason=refusal.code))

    def _fail(self, error: FlglmError) -> None:
        self.failure = error
        while not self.outgoing.empty():
            self.outgoing.get_nowait().answer.set_exception(error)
        for waiting in [self.welcome, *self.waiting.values()]:
            if not waiting.done():
                waiting.set_exception(error)
        self.waiting.clear()


def _refused(close: Close) -> FlglmError:
    """What a CLOSE from broker or server means for the person at the client."""
    if close.code in ("handshake",):
        return HandshakeError(f"the server refused the handshake: {close.message}")
    if close.code in PASSING:
        return ConnectionFailed(close.message, hint="when it is back, run the same command to resume")
    return Refused(close.message, reason=close.code)
