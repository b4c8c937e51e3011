"""The broker's sockets: the only file here that does I/O."""

import logging
import time
from types import TracebackType

import zmq

from broker.routing import Peer, Router, Send, Side
from broker.settings import BrokerSettings
from shared.errors import ConnectionFailed
from shared.logs import event
from shared.wire.envelope import Close, pack
from shared.wire.waker import Waker

MAX_MESSAGES_A_TURN = 256
LINGER_MS = 500
# A signal that comes just before the wait does not interrupt it: its handler, and so `stop()`, runs after the wait.
MAX_WAIT_S = 0.2

logger = logging.getLogger(__name__)


class Broker:
    """Entering binds both sockets (`frontend`, `backend`: the bound addresses), `run()` routes until `stop()`."""

    def __init__(self, settings: BrokerSettings, context: "zmq.Context[zmq.Socket[bytes]] | None" = None) -> None:
        self.settings = settings
        self.context = context or zmq.Context.instance()
        self.router = Router(settings)
        self.waker = Waker()
        self.sockets: dict[Side, zmq.Socket[bytes]] = {}
        self.frontend = ""
        self.backend = ""
        self._stopping = False

    def __enter__(self) -> "Broker":
        """Raises ConnectionFailed if an address cannot be bound."""
        try:
            self.frontend = self._bind("client", self.settings.frontend)
            self.backend = self._bind("server", self.settings.backend)
        except ConnectionFailed:
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
        next_tick = time.monotonic() + tick_s
        while not self._stopping:
            wait_s = min(MAX_WAIT_S, max(0.0, next_tick - time.monotonic()))
            poller.poll(int(wait_s * 1000) + 1)
            self.waker.drain()
            for side in self.sockets:
                self._receive(side)
            if time.monotonic() >= next_tick:
                self._send(self.router.tick(time.monotonic()))
                next_tick = time.monotonic() + tick_s
        farewell = pack(Close(code="broker_stopping", message="the broker stops"))
        self._send([Send(peer, farewell) for peer in self.router.peers])
        event(logger, "broker_stopped", **{key: int(value) for key, value in sorted(self.router.counters.items())})

    def _receive(self, side: Side) -> None:
        """A bounded number of messages, so that neither side nor the clock starves."""
        socket = self.sockets[side]
        for _ in range(MAX_MESSAGES_A_TURN):
            try:
                routing_id, *frames = socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            peer = Peer(side, routing_id.bytes)
            self._send(self.router.handle(peer, [frame.buffer for frame in frames], time.monotonic()))

    def _send(self, sends: list[Send]) -> None:
        while sends:
            send = sends.pop(0)
            try:
                self.sockets[send.to.side].send_multipart(
                    [send.to.id, *send.envelope.frames()], zmq.DONTWAIT, copy=False
                )
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
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, self.settings.max_frame_bytes)
        socket.setsockopt(zmq.SNDHWM, self.settings.high_water_mark)
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
        self.waker.close()
