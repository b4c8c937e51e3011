"""The broker's sockets: the only file here that does I/O."""

import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, cast

import zmq
from zmq.auth.thread import ThreadAuthenticator

from broker.guard import Guard, Guest, Side
from broker.metrics import BrokerMetrics
from broker.routing import Peer, Router, Send
from broker.settings import BrokerSettings
from broker.throttle import Rate, Throttle
from shared.errors import ConnectionFailed, FlglmError
from shared.logs import event
from shared.monitoring import Health, new_registry
from shared.wire import multipart
from shared.wire.curve import check_plain, use_as_broker
from shared.wire.envelope import Close, Frame, pack
from shared.wire.waker import Waker

MAX_MESSAGES_A_TURN = 256
LINGER_MS = 500
HANDSHAKE_MS = 10_000
# A signal that comes just before the wait does not interrupt it: its handler, and so `stop()`, runs after the wait.
MAX_WAIT_S = 0.2
# How often the allow lists are looked at: whoever is revoked is out after this long.
GUESTS_S = 0.25
# How long messages that are over a worker's rate wait between two looks.
HELD_S = 0.01

logger = logging.getLogger(__name__)


class Received(NamedTuple):
    """A message that came, and who sent it."""

    peer: Peer
    frames: Sequence[Frame]
    guest: Guest | None


class Broker:
    """Entering binds both sockets (`frontend`, `backend`: the bound addresses), `run()` routes until `stop()`.

    Without a `guard` links are plain, and only on this machine.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        context: "zmq.Context[zmq.Socket[bytes]] | None" = None,
        guard: Guard | None = None,
    ) -> None:
        self.settings = settings
        self.guard = guard
        self.authenticator: ThreadAuthenticator | None = None
        rate = Rate(settings.max_messages_per_s, settings.max_bytes_per_s, settings.max_waiting)
        self.throttle: Throttle[Received] = Throttle(rate)
        self.context = context or zmq.Context.instance()
        self.router = Router(settings)
        self.waker = Waker()
        self.sockets: dict[Side, zmq.Socket[bytes]] = {}
        self.frontend = ""
        self.backend = ""
        self.health = Health()
        self.registry = new_registry()
        self.registry.register(BrokerMetrics(lambda: self.router, self.throttle))
        self._stopping = False

    def __enter__(self) -> "Broker":
        """Raises ConnectionFailed if an address cannot be bound, UsageError if a plain one is not local."""
        if self.guard is not None:
            self.authenticator = self.guard.authenticator(self.context)
        try:
            self.frontend = self._bind("client", self.settings.frontend)
            self.backend = self._bind("server", self.settings.backend)
        except FlglmError:
            self._close()
            raise
        event(logger, "broker_ready", clients=self.frontend, servers=self.backend)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def stop(self) -> None:
        """From any thread or a signal handler."""
        self._stopping = True
        self.waker.wake()

    def run(self) -> None:
        """Route until `stop()`, then tell all workers."""
        poller = zmq.Poller()
        for socket in self.sockets.values():
            poller.register(socket, zmq.POLLIN)
        poller.register(self.waker.reader, zmq.POLLIN)
        tick_s = min(self.settings.heartbeat_s, self.settings.timeout_s / 4)
        next_tick = next_look = time.monotonic()
        self.health.ready = True
        while not self._stopping:
            self.health.beat(time.monotonic())
            wait_s = min(HELD_S if self.throttle.holds else MAX_WAIT_S, max(0.0, next_tick - time.monotonic()))
            ready = dict(poller.poll(int(wait_s * 1000) + 1))
            if self.waker.reader.fileno() in ready:
                self.waker.drain()
            for side, socket in self.sockets.items():
                if socket in ready:
                    self._receive(side)
            now = time.monotonic()
            for received in self.throttle.due(now):
                self._handle(received, now)
            if now >= next_look:
                self._look_at_guests()
                next_look = now + GUESTS_S
            if now >= next_tick:
                self._send(self.router.tick(now))
                workers = {known.guest or peer for peer, known in self.router.peers.items()}
                self.throttle.forget(workers.__contains__)
                next_tick = now + tick_s
        self.health.ready = False
        farewell = pack(Close(code="broker_stopping", message="the broker stops"))
        self._send([Send(peer, farewell) for peer in self.router.peers])
        event(logger, "broker_stopped", **{key: int(value) for key, value in sorted(self.router.counters.items())})

    def _receive(self, side: Side) -> None:
        """A bounded number of messages, so that neither side nor the clock starves."""
        socket = self.sockets[side]
        for _ in range(MAX_MESSAGES_A_TURN):
            if not multipart.waiting(socket):
                return
            routing_id, *frames = multipart.receive(socket)
            peer = Peer(side, routing_id.bytes)
            guest = None if self.guard is None else self._guest(self.guard, side, frames)
            now = time.monotonic()
            if self.guard is not None and guest is None:
                self._send(self.router.expel(peer, "not_admitted", "this key is not admitted here (any more)"))
                continue
            # The frames themselves, not their buffers: libzmq then passes them on without a copy or a callback.
            received = Received(peer, cast("Sequence[Frame]", frames), guest)
            passes = self.throttle.take(guest or peer, sum(map(len, frames)), received, now)
            if passes:
                self._handle(received, now)
            elif passes is None:
                self._send(self.router.expel(peer, "too_fast", "too many messages wait for this worker's rate"))

    def _handle(self, received: "Received", now: float) -> None:
        self._send(self.router.handle(received.peer, received.frames, now, received.guest))

    @staticmethod
    def _guest(guard: Guard, side: Side, frames: Sequence[zmq.Frame]) -> Guest | None:
        """Who sent this message: ZeroMQ notes the key of the connection on each."""
        user = frames[0].get("User-Id") if frames else ""
        return guard.lists[side].known.get(str(user))

    def _look_at_guests(self) -> None:
        """Put out who has been taken off the lists."""
        if self.guard is None:
            return
        admitted = {side: set(listed.refresh().values()) for side, listed in self.guard.lists.items()}
        for peer, known in list(self.router.peers.items()):
            if known.guest not in admitted[peer.side]:
                self._send(self.router.expel(peer, "revoked", "the admission was taken back"))

    def _send(self, sends: list[Send]) -> None:
        while sends:
            send = sends.pop(0)
            try:
                multipart.send(self.sockets[send.to.side], [send.to.id, *send.envelope.frames()])
            except zmq.Again:
                event(logger, "peer_too_slow", level=logging.WARNING, peer=send.to.id[-8:])
                sends.extend(self.router.undeliverable(send))
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                sends.extend(self.router.lost(send.to))
            if isinstance(send.envelope.header, Close):
                header = send.envelope.header
                event(logger, "closed", session=header.session, code=header.code, told=send.to.side)

    def _bind(self, side: Side, address: str) -> str:
        socket = self.context.socket(zmq.ROUTER)
        self.sockets[side] = socket
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        if self.guard is None:
            check_plain(address)
        else:
            use_as_broker(socket, self.guard.keys, side)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, self.settings.max_frame_bytes)
        to_servers = self.settings.server_high_water_mark
        socket.setsockopt(zmq.SNDHWM, to_servers if side == "server" else self.settings.high_water_mark)
        socket.setsockopt(zmq.RCVHWM, self.settings.high_water_mark)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise ConnectionFailed(
                f"cannot listen on {address} for {side}s: {error.strerror}",
                hint=f"stop what uses it, or give another --{side}s-address",
            ) from None
        return socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _close(self) -> None:
        for socket in self.sockets.values():
            socket.close()
        self.sockets = {}
        if self.authenticator is not None:
            self.authenticator.stop()
        self.waker.close()
