"""The server's connections to all its brokers: every session goes through the one that it came by.

A broker that falls silent or stops takes its sessions with it, and no others; it is greeted until it is back.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import zmq

from shared.errors import ConnectionFailed
from shared.logs import event
from shared.wire.connection import BrokerConnection
from shared.wire.curve import Door, LinkKeys
from shared.wire.envelope import Close, Envelope, Hello

POLL_S = 0.05

logger = logging.getLogger(__name__)


class Brokers:
    """A context manager. Raises ConnectionFailed once no broker has been there for `timeout_s`."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        doors: Sequence[Door],
        hello: Hello,
        keys: LinkKeys | None,
        timeout_s: float,
    ) -> None:
        self.timeout_s = timeout_s
        self.connections = [BrokerConnection(context, door, hello, keys) for door in doors]
        self.routes: dict[bytes, BrokerConnection] = {}
        # What came right behind a broker's first answer.
        self._early: list[tuple[BrokerConnection, Envelope]] = []
        self._alone_since: float | None = None

    @property
    def addresses(self) -> str:
        return ", ".join(connection.address for connection in self.connections)

    def __enter__(self) -> "Brokers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self.connections:
            connection.__exit__(kind, error, trace)

    def open(self, timeout_s: float, cancelled: Callable[[], bool]) -> None:
        """Greet all, wait for the first to answer. Raises ConnectionFailed."""
        for connection in self.connections:
            connection.start()
        deadline = time.monotonic() + timeout_s
        refused = ""
        while not any(connection.up for connection in self.connections):
            if cancelled():
                raise ConnectionFailed("stopped while waiting for the broker")
            if time.monotonic() > deadline:
                raise ConnectionFailed(
                    refused or f"no broker answers at {self.addresses} (waited {timeout_s:g} s)",
                    hint="start it with 'flglm broker', or check address, firewall and the broker's key",
                )
            for connection in self.connections:
                connection.socket.poll(int(POLL_S * 1000))
                connection.check_door()
                envelope = connection.receive(time.monotonic())
                if envelope is None:
                    if not connection.up:
                        connection.greet_again(time.monotonic())
                    continue
                if not isinstance(envelope.header, Close):
                    self._early.append((connection, envelope))
                elif envelope.header.session is None:
                    refused = f"the broker at {connection.address} refused: {envelope.header.message}"
                    if envelope.header.code not in ("unknown_peer", "broker_stopping"):
                        raise ConnectionFailed(refused)

    def receive(self, now: float) -> Iterator[tuple[BrokerConnection, Envelope]]:
        """All messages that are here, and whence they came.

        One by one: a broker that was away may answer what it got first with `unknown_peer`, and then the greeting.
        """
        early, self._early = self._early, []
        yield from early
        for connection in self.connections:
            for envelope in connection.received(now):
                yield connection, envelope

    def send(self, envelope: Envelope) -> bool:
        """Towards the session's broker. False if that takes no more: the session is lost."""
        connection = self.routes.get(getattr(envelope.header, "session", b""))
        if connection is None:
            return False
        try:
            connection.send(envelope)
        except ConnectionFailed as error:
            event(logger, "broker_full", level=logging.WARNING, broker=connection.address, reason=error.message)
            return False
        return True

    def down(self, connection: BrokerConnection, reason: str) -> list[bytes]:
        """A broker has said that it stops, or knows this server no more; the sessions that went through it."""
        if connection.up:
            event(logger, "broker_lost", level=logging.WARNING, broker=connection.address, reason=reason)
        connection.greet_again(time.monotonic())
        return [session for session, through in self.routes.items() if through is connection]

    def tick(self, now: float) -> list[bytes]:
        """Heartbeats; sessions whose broker fell silent. Raises ConnectionFailed if all are away for too long."""
        lost: list[bytes] = []
        for connection in self.connections:
            if not connection.up:
                connection.greet_again(now)
                continue
            try:
                connection.tick(now)
            except ConnectionFailed as error:
                lost += self.down(connection, error.message)
        if any(connection.up for connection in self.connections):
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        elif now - self._alone_since > self.timeout_s:
            raise ConnectionFailed(
                f"no broker at {self.addresses} for {self.timeout_s:g} s",
                hint="start it again, then run the same command to resume",
            )
        return lost

    def close_politely(self) -> None:
        for connection in self.connections:
            if connection.up:
                connection.close_politely()
