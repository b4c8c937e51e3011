"""The broker's sockets: real ones, on free ports."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

import shared.wire.connection
from broker.service import Broker
from broker.settings import BrokerSettings
from shared.errors import ConnectionFailed
from shared.wire.connection import BrokerConnection, hello
from shared.wire.curve import Door
from shared.wire.envelope import Close, Data, Envelope, Open, pack

ANYWHERE = "tcp://127.0.0.1:*"
IDENTITY, SESSION = b"i" * 32, b"x" * 16
WAIT_MS = 10_000


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(0)


@pytest.fixture
def broker(context: "zmq.Context[zmq.Socket[bytes]]") -> Iterator[Broker]:
    settings = BrokerSettings(frontend=ANYWHERE, backend=ANYWHERE, heartbeat_s=0.1, timeout_s=3, high_water_mark=4)
    with Broker(settings, context) as running:
        thread = threading.Thread(target=running.run)
        thread.start()
        yield running
        running.stop()
        thread.join(10)
        assert not thread.is_alive()


def receive(connection: BrokerConnection) -> Envelope:
    while True:
        assert connection.socket.poll(WAIT_MS), "nothing came"
        envelope = connection.receive(0.0)
        if envelope is not None:
            return envelope


Connect = Callable[[str], BrokerConnection]


@pytest.fixture
def connect(context: "zmq.Context[zmq.Socket[bytes]]", broker: Broker) -> Iterator[Connect]:
    """Greeted connections of a role, closed at the end."""
    made: list[BrokerConnection] = []

    def greet(role: str) -> BrokerConnection:
        if role == "server":
            made.append(BrokerConnection(context, Door(broker.backend), hello("server", IDENTITY)))
        else:
            made.append(BrokerConnection(context, Door(broker.frontend), hello("client")))
        made[-1].open(10)
        return made[-1]

    yield greet
    for connection in made:
        connection.socket.close(0)


def session_of(client: BrokerConnection, server: BrokerConnection, session: bytes = SESSION) -> None:
    client.send(pack(Open(version=1, session=session, server=IDENTITY, job=b"j" * 32), [b"1"]))
    assert isinstance(receive(server).header, Open)


def test_bodies_arrive_byte_for_byte(connect: Connect) -> None:
    client, server = connect("client"), connect("server")
    session_of(client, server)
    body = [bytes(range(256)) * 20_000, b"", b"small"]
    client.send(pack(Data(session=SESSION, sequence=0), body))
    assert [bytes(frame) for frame in receive(server).body] == body
    server.send(pack(Data(session=SESSION, sequence=0), body[::-1]))
    assert [bytes(frame) for frame in receive(client).body] == body[::-1]


def test_a_worker_that_disappears_is_noticed_and_the_other_is_told(connect: Connect) -> None:
    client, server = connect("client"), connect("server")
    session_of(client, server)
    server.socket.close(0)
    closed: Envelope | None = None
    deadline = time.monotonic() + WAIT_MS / 1000
    while closed is None and time.monotonic() < deadline:
        client.tick(time.monotonic())
        client.socket.poll(50)
        closed = client.receive(time.monotonic())
    assert closed is not None
    assert isinstance(closed.header, Close)
    assert closed.header.code == "server_gone"


def test_a_reader_that_does_not_read_stalls_nobody_else(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    other, server = connect("client"), connect("server")
    monkeypatch.setattr(shared.wire.connection, "HIGH_WATER_MARK", 2)
    lazy = connect("client")
    session_of(lazy, server)
    session_of(other, server, b"y" * 16)
    # The first client reads nothing; what does not fit its queue ends its session.
    for sequence in range(60):
        server.send(pack(Data(session=SESSION, sequence=sequence), [bytes(2**20)]))
        server.send(pack(Data(session=b"y" * 16, sequence=sequence), [b"quick"]))
        header = receive(other).header
        assert isinstance(header, Data)
        assert header.sequence == sequence
    refusal = receive(server).header
    assert isinstance(refusal, Close)
    assert refusal.code == "peer_too_slow"


def test_a_port_in_use_is_an_error_that_names_it(context: "zmq.Context[zmq.Socket[bytes]]", broker: Broker) -> None:
    settings = BrokerSettings(frontend=broker.frontend, backend=ANYWHERE)
    with pytest.raises(ConnectionFailed) as error, Broker(settings, context):
        pass
    assert broker.frontend in error.value.message
    assert error.value.hint is not None
    assert "--clients-address" in error.value.hint


def test_no_broker_is_a_bounded_wait(context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    with (
        BrokerConnection(context, Door("tcp://127.0.0.1:9"), hello("client")) as connection,
        pytest.raises(ConnectionFailed, match=r"no broker answers at tcp://127\.0\.0\.1:9"),
    ):
        connection.open(0.2)


def test_a_broker_that_falls_silent_is_noticed(connect: Connect) -> None:
    client = connect("client")
    assert client.heartbeat is not None
    later = client.heartbeat._heard + 3.1
    with pytest.raises(ConnectionFailed, match="fell silent"):
        client.tick(later)


def test_the_broker_loads_no_models_and_nothing_that_opens_bodies() -> None:
    script = "import sys, broker.service; print([m for m in sys.modules if m.split('.')[0] in " + (
        "('torch', 'transformers') or m.startswith(('shared.secure', 'shared.payload'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"
