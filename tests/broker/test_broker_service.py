"""The broker's sockets against bare DEALERs: in process, in its own process, and against what is not a worker."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from broker.service import Broker
from broker.settings import BrokerSettings
from shared.errors import ConnectionFailed
from shared.wire.envelope import Close, Data, Envelope, Header, Hello, Open, Ping, Pong, Welcome, pack, parse

Context = zmq.Context[zmq.Socket[bytes]]
Dealer = zmq.Socket[bytes]

REPOSITORY = Path(__file__).parents[2]
ANYWHERE = "tcp://127.0.0.1:*"
IDENTITY, SESSION = b"i" * 32, b"x" * 16
WAIT_MS = 10_000
# So long that nothing in a test ends because of it.
PATIENT = BrokerSettings(frontend=ANYWHERE, backend=ANYWHERE, heartbeat_s=60, timeout_s=600)


@pytest.fixture
def context() -> Iterator[Context]:
    made: Context = zmq.Context()
    yield made
    made.destroy(0)


@contextmanager
def running(context: Context, settings: BrokerSettings = PATIENT) -> Iterator[Broker]:
    with Broker(settings, context) as broker:
        thread = threading.Thread(target=broker.run)
        thread.start()
        try:
            yield broker
        finally:
            broker.stop()
            thread.join(10)
            assert not thread.is_alive()


Connect = Callable[[str], Dealer]


@pytest.fixture
def connect(context: Context) -> Iterator[Connect]:
    """Bare DEALERs, closed at the end."""
    made: list[Dealer] = []

    def dealer(address: str) -> Dealer:
        made.append(context.socket(zmq.DEALER))
        made[-1].setsockopt(zmq.RECONNECT_IVL, 10)
        made[-1].connect(address)
        return made[-1]

    yield dealer
    for socket in made:
        socket.close(0)


def say(socket: Dealer, header: Header, *body: bytes) -> None:
    socket.send_multipart(pack(header, body).frames())


def hear(socket: Dealer) -> Envelope:
    assert socket.poll(WAIT_MS), "nothing came"
    return parse(socket.recv_multipart())


def code_heard(socket: Dealer) -> str:
    header = hear(socket).header
    assert isinstance(header, Close)
    return header.code


def greeted(connect: Connect, address: str, identity: bytes | None = None) -> Dealer:
    socket = connect(address)
    say(socket, Hello(version=1, role="client" if identity is None else "server", identity=identity))
    assert isinstance(hear(socket).header, Welcome)
    return socket


def session_between(client: Dealer, server: Dealer) -> None:
    say(client, Open(version=1, session=SESSION, server=IDENTITY, job=b"j" * 32), b"message 1")
    assert isinstance(hear(server).header, Open)


def test_in_one_process_the_same_broker_routes(context: Context, connect: Connect) -> None:
    settings = BrokerSettings(frontend="inproc://clients", backend="inproc://servers")
    with running(context, settings) as broker:
        assert (broker.frontend, broker.backend) == ("inproc://clients", "inproc://servers")
        client = greeted(connect, broker.frontend)
        server = greeted(connect, broker.backend, IDENTITY)
        session_between(client, server)
        body = [bytes(range(256)) * 20_000, b"", b"small"]
        say(client, Data(session=SESSION, sequence=0), *body)
        assert [bytes(frame) for frame in hear(server).body] == body
        say(server, Data(session=SESSION, sequence=0), b"back")
        assert list(hear(client).body) == [b"back"]


@pytest.mark.parametrize(
    ("garbage", "refusal"),
    [
        ([b""], "frame"),
        ([b"GET / HTTP/1.1"], "frame"),
        ([b"D", b"\xff" * 2000, b""], "frame"),
        ([b"?", b""], "envelope"),
    ],
)
def test_garbage_is_refused_and_others_are_served_on(
    context: Context, connect: Connect, garbage: list[bytes], refusal: str
) -> None:
    with running(context) as broker:
        client = greeted(connect, broker.frontend)
        stranger = connect(broker.frontend)
        stranger.send_multipart(garbage)
        assert code_heard(stranger) == refusal
        say(client, Ping())
        assert isinstance(hear(client).header, Pong)


def test_a_frame_over_the_limit_is_not_taken_and_its_sender_must_greet_again(
    context: Context, connect: Connect
) -> None:
    with running(context, PATIENT.model_copy(update={"max_frame_bytes": 10_000})) as broker:
        client = greeted(connect, broker.frontend)
        server = greeted(connect, broker.backend, IDENTITY)
        session_between(client, server)
        say(client, Data(session=SESSION, sequence=0), bytes(10_000))
        assert len(hear(server).body[0]) == 10_000
        say(client, Data(session=SESSION, sequence=1), bytes(10_001))
        assert ping_until_refused(client) == "unknown_peer"
        say(server, Ping())
        assert isinstance(hear(server).header, Pong)


def ping_until_refused(socket: Dealer) -> str:
    """What the broker says once it no longer knows this connection; a ping may be lost with the old one."""
    for _ in range(WAIT_MS // 50):
        say(socket, Ping())
        if socket.poll(50):
            header = parse(socket.recv_multipart()).header
            if isinstance(header, Close):
                return header.code
    raise AssertionError("never refused")


def test_a_vanished_server_is_noticed_when_something_is_sent_to_it(context: Context, connect: Connect) -> None:
    with running(context) as broker:
        client = greeted(connect, broker.frontend)
        server = greeted(connect, broker.backend, IDENTITY)
        session_between(client, server)
        server.close(0)
        for sequence in range(WAIT_MS // 20):
            say(client, Data(session=SESSION, sequence=sequence), b"anybody there?")
            if client.poll(20):
                break
        assert code_heard(client) == "server_gone"


def test_a_vanished_client_is_missed_when_its_ping_is_late_long_before_the_timeout(
    context: Context, connect: Connect
) -> None:
    settings = BrokerSettings(frontend=ANYWHERE, backend=ANYWHERE, heartbeat_s=0.1, timeout_s=600)
    with running(context, settings) as broker:
        server = greeted(connect, broker.backend, IDENTITY)
        client = greeted(connect, broker.frontend)
        session_between(client, server)
        client.close(0)
        while (envelope := hear(server)).header == Pong():
            pass
        assert isinstance(envelope.header, Close)
        assert envelope.header.code == "client_gone"


def test_a_worker_of_a_restarted_broker_learns_that_it_must_greet_again(connect: Connect) -> None:
    # Leaving a context waits until its ports are free.
    with zmq.Context() as one, running(one) as first:
        again = PATIENT.model_copy(update={"frontend": first.frontend, "backend": first.backend})
        client = greeted(connect, first.frontend)
    assert code_heard(client) == "broker_stopping"
    with zmq.Context() as other, running(other, again):
        assert ping_until_refused(client) == "unknown_peer"


def test_stopping_is_told_to_all_workers(context: Context, connect: Connect) -> None:
    with running(context) as broker:
        workers = [greeted(connect, broker.frontend) for _ in range(3)]
        workers.append(greeted(connect, broker.backend, IDENTITY))
    assert [code_heard(worker) for worker in workers] == ["broker_stopping"] * 4


def test_a_broker_stopped_before_it_runs_returns_at_once(context: Context) -> None:
    with Broker(PATIENT, context) as broker:
        broker.stop()
        broker.run()
    broker.stop()


@pytest.mark.parametrize("address", ["nowhere", "tcp://127.0.0.1", "ipc:///no/such/folder/socket"])
@pytest.mark.parametrize("side", ["frontend", "backend"])
def test_an_address_that_cannot_be_bound_is_one_clear_error(context: Context, side: str, address: str) -> None:
    with pytest.raises(ConnectionFailed) as error, Broker(PATIENT.model_copy(update={side: address}), context):
        pass
    assert address in error.value.message
    assert error.value.hint is not None
    assert ("--clients-address" if side == "frontend" else "--servers-address") in error.value.hint


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_as_a_process_it_says_where_it_listens_and_ends_in_good_order(
    context: Context, connect: Connect, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "broker", "--clients-address", ANYWHERE, "--servers-address", ANYWHERE, "--plain"]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            ready = json.loads(process.stderr.readline())
            assert ready["event"] == "broker_ready"
            client = greeted(connect, ready["clients"])
            greeted(connect, ready["servers"], IDENTITY)
            process.send_signal(number)
            assert code_heard(client) == "broker_stopping"
            assert process.wait(10) == 0
            assert json.loads(process.stderr.readlines()[-1])["event"] == "broker_stopped"
        finally:
            process.kill()


def as_a_command(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "broker", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_as_a_process_a_port_in_use_ends_in_one_line(context: Context) -> None:
    with running(context) as broker:
        ended = as_a_command("--clients-address", broker.frontend, "--servers-address", ANYWHERE, "--plain")
        assert ended.returncode == 2
        (line,) = ended.stderr.splitlines()
        assert broker.frontend in line
        assert "--clients-address" in line


def test_as_a_process_wrong_words_are_bad_arguments() -> None:
    ended = as_a_command("--nonsense")
    assert ended.returncode == 4
    (line,) = ended.stderr.splitlines()
    assert "--nonsense" in line
