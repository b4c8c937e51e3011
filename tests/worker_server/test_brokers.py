"""Greetings that get lost, and answers that come late: a connection is up when the broker's last word was a welcome."""

import time
from collections.abc import Iterator

import pytest
import zmq

from launcher.in_process import Background
from shared import PROTOCOL_VERSION
from shared.wire.connection import BrokerConnection, hello
from shared.wire.curve import Door
from shared.wire.envelope import Close, Header, Hello, Welcome, pack, parse
from worker_server.brokers import Brokers

ADDRESS = "inproc://broker"
WAIT_S = 10.0
WELCOME = Welcome(version=PROTOCOL_VERSION, heartbeat_s=2.0, timeout_s=15.0)
UNKNOWN = Close(code="unknown_peer", message="say HELLO first")


class Said:
    """A broker's socket without a broker: it says what a test has it say."""

    def __init__(self, context: "Context") -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.bind(ADDRESS)
        self.worker = b""

    def greeted(self) -> None:
        assert self.socket.poll(int(WAIT_S * 1000))
        self.worker, *frames = self.socket.recv_multipart()
        assert isinstance(parse(frames).header, Hello)

    def say(self, *headers: Header) -> None:
        for header in headers:
            self.socket.send_multipart([self.worker, *pack(header).frames()])


Context = zmq.Context[zmq.Socket[bytes]]


@pytest.fixture
def context() -> Iterator[Context]:
    with zmq.Context() as made:
        yield made


@pytest.fixture
def broker(context: Context) -> Iterator[Said]:
    made = Said(context)
    yield made
    made.socket.close(0)


def test_a_greeting_that_nobody_answers_is_said_again(
    broker: Said, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker that heard it is dead; the one in its place knows nothing of this worker."""
    monkeypatch.setattr("shared.wire.connection.GREET_S", 0.01)
    with BrokerConnection(context, Door(ADDRESS), hello("client")) as connection:
        opening = Background("opening", lambda: connection.open(WAIT_S))
        broker.greeted()
        broker.greeted()
        broker.say(WELCOME)
        opening.join()
        assert connection.up


@pytest.mark.parametrize(("said", "up"), [((UNKNOWN, WELCOME), True), ((WELCOME, UNKNOWN), False)])
def test_the_last_word_counts(said: tuple[Header, ...], up: bool, broker: Said, context: Context) -> None:
    """After a cut, what was on the way comes before the greeting, and is answered before it."""
    with Brokers(context, [Door(ADDRESS)], hello("server", b"s" * 32), None, WAIT_S) as brokers:
        (connection,) = brokers.connections
        opening = Background("opening", lambda: brokers.open(WAIT_S, lambda: False))
        broker.greeted()
        broker.say(WELCOME)
        opening.join()
        broker.say(*said)
        assert connection.socket.poll(int(WAIT_S * 1000))
        heard = []
        for through, envelope in brokers.receive(time.monotonic()):
            heard.append(envelope.header)
            brokers.down(through, "unknown_peer")
        assert heard == [UNKNOWN]
        assert connection.up is up
