"""CURVE links with allow lists: who comes in, who does not, and who is put out."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
import zmq

from broker.guard import Guard
from broker.service import Broker
from broker.settings import BrokerSettings
from shared.allow_list import admit, revoke
from shared.errors import ConnectionFailed, UsageError
from shared.identity import Identity, create_identity, key_digest
from shared.wire.connection import BrokerConnection, hello
from shared.wire.curve import Door
from shared.wire.envelope import Accept, Close, Data, Envelope, Open, pack

ANYWHERE = "tcp://127.0.0.1:*"
WAIT_S = 10.0
SESSION = b"s" * 16


@dataclass
class House:
    """A guarded broker, who lives around it, and how they connect."""

    broker: Broker
    folder: Path
    people: dict[str, Identity]
    connect: Callable[..., BrokerConnection]


def person(folder: Path, name: str, admitted: str | None) -> Identity:
    identity = create_identity(folder / "keys", name)
    if admitted:
        admit(folder / "keys" / f"{name}.card", folder / admitted, datetime.now(UTC))
    return identity


@pytest.fixture
def house(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[House]:
    people = {name: person(tmp_path, name, "clients") for name in ("anna", "berta")}
    people |= {name: person(tmp_path, name, "servers") for name in ("gpu", "other-gpu")}
    people |= {name: person(tmp_path, name, None) for name in ("broker", "stranger")}
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    limits = getattr(request, "param", {})
    settings = BrokerSettings(frontend=ANYWHERE, backend=ANYWHERE, heartbeat_s=0.5, timeout_s=5, **limits)
    guard = Guard(people["broker"].link, tmp_path / "clients", tmp_path / "servers")
    made: list[BrokerConnection] = []
    with Broker(settings, context, guard) as broker:

        def connect(name: str, role: str = "client", broker_key: bytes | None = None) -> BrokerConnection:
            who = people[name]
            greeting = hello("client") if role == "client" else hello("server", key_digest(who.public))
            address = broker.frontend if role == "client" else broker.backend
            door = Door(address, broker_key or people["broker"].link.public)
            made.append(BrokerConnection(context, door, greeting, who.link))
            return made[-1]

        thread = threading.Thread(target=broker.run)
        thread.start()
        yield House(broker, tmp_path, people, connect)
        for connection in made:
            connection.__exit__(None, None, None)
        broker.stop()
        thread.join(WAIT_S)
        assert not thread.is_alive()
    context.destroy(0)


def receive(connection: BrokerConnection) -> Envelope:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        connection.socket.poll(50)
        if (envelope := connection.receive(time.monotonic())) is not None:
            return envelope
    pytest.fail("nothing came")


def opened(house: House) -> tuple[BrokerConnection, BrokerConnection]:
    client, server = house.connect("anna"), house.connect("gpu", "server")
    client.open(WAIT_S)
    server.open(WAIT_S)
    identity = key_digest(house.people["gpu"].public)
    client.send(pack(Open(version=1, session=SESSION, server=identity, job=b"j" * 32), [b"1"]))
    assert isinstance(receive(server).header, Open)
    server.send(pack(Accept(session=SESSION), [b"2"]))
    assert isinstance(receive(client).header, Accept)
    return client, server


def test_the_admitted_talk_through_encrypted_links(house: House) -> None:
    client, server = opened(house)
    assert client.socket.getsockopt(zmq.MECHANISM) == zmq.CURVE
    body = [bytes(range(256)) * 1000]
    client.send(pack(Data(session=SESSION, sequence=0), body))
    assert [bytes(frame) for frame in receive(server).body] == body


@pytest.mark.parametrize(("name", "role"), [("stranger", "client"), ("anna", "server"), ("gpu", "client")])
def test_who_is_not_on_the_list_of_that_door_is_told_so_at_once(house: House, name: str, role: str) -> None:
    with pytest.raises(ConnectionFailed, match="does not admit this key") as error:
        house.connect(name, role).open(WAIT_S)
    assert "flglm admit" in (error.value.hint or "")
    assert house.broker.router.peers == {}


def test_who_is_admitted_later_comes_in_without_a_restart(house: House) -> None:
    with pytest.raises(ConnectionFailed):
        house.connect("stranger").open(WAIT_S)
    admit(house.folder / "keys" / "stranger.card", house.folder / "clients", datetime.now(UTC))
    connection = house.connect("stranger")
    connection.open(WAIT_S)
    assert connection.up


def test_a_worker_talks_to_no_other_broker_than_its_own(house: House) -> None:
    with pytest.raises(ConnectionFailed, match="no broker answers"):
        house.connect("anna", broker_key=house.people["stranger"].link.public).open(0.5)


def test_plain_workers_get_no_answer_from_a_guarded_door(house: House) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    connection = BrokerConnection(context, Door(house.broker.frontend), hello("client"))
    with connection, pytest.raises(ConnectionFailed):
        connection.open(1.0)
    context.destroy(0)
    assert house.broker.router.peers == {}


def test_a_server_cannot_take_another_s_place(house: House) -> None:
    client, server = opened(house)
    thief = house.connect("other-gpu", "server")
    thief.hello = hello("server", key_digest(house.people["gpu"].public))
    with pytest.raises(ConnectionFailed, match="another identity than its own"):
        thief.open(WAIT_S)
    client.send(pack(Data(session=SESSION, sequence=0), [b"still"]))
    assert bytes(receive(server).body[0]) == b"still"


@pytest.mark.parametrize(("name", "list_"), [("anna", "clients"), ("gpu", "servers")])
def test_whoever_is_revoked_is_out_within_a_second_and_the_other_end_hears(house: House, name: str, list_: str) -> None:
    client, server = opened(house)
    out, stays = (client, server) if name == "anna" else (server, client)
    revoke(name, house.folder / list_)
    began = time.monotonic()
    told = receive(out).header
    assert isinstance(told, Close)
    assert (told.code, told.session) == ("revoked", None)
    gone = receive(stays).header
    assert isinstance(gone, Close)
    assert gone.code == f"{out.hello.role}_gone"
    assert time.monotonic() - began < 1.0
    out.send(pack(Data(session=SESSION, sequence=0), [b"again"]))
    again = receive(out).header
    assert isinstance(again, Close)
    assert again.code == "not_admitted"


def test_a_folder_that_cannot_be_read_puts_nobody_out_and_lets_nobody_new_in(house: House) -> None:
    client, server = opened(house)
    (house.folder / "clients" / "bad.card").write_text("{")
    time.sleep(0.6)
    client.send(pack(Data(session=SESSION, sequence=0), [b"still"]))
    assert bytes(receive(server).body[0]) == b"still"
    admit_by_hand = (house.folder / "keys" / "stranger.card").read_text()
    (house.folder / "clients" / "stranger.card").write_text(admit_by_hand)
    with pytest.raises(ConnectionFailed, match="does not admit"):
        house.connect("stranger").open(WAIT_S)


@pytest.mark.parametrize("house", [{"max_connections_per_worker": 2}], indirect=True)
def test_one_worker_has_a_bounded_number_of_connections(house: House) -> None:
    for _ in range(2):
        house.connect("anna").open(WAIT_S)
    with pytest.raises(ConnectionFailed, match="too many connections"):
        house.connect("anna").open(WAIT_S)
    house.connect("berta").open(WAIT_S)


@pytest.mark.parametrize("house", [{"max_messages_per_s": 50.0, "max_waiting": 20}], indirect=True)
def test_who_floods_is_slowed_then_put_out_alone(house: House) -> None:
    client, server = opened(house)
    flood = house.connect("berta")
    flood.open(WAIT_S)
    for _ in range(200):
        flood.send(pack(Data(session=b"f" * 16, sequence=0), [b"x"]))
    codes = set()
    while "too_fast" not in codes:
        header = receive(flood).header
        assert isinstance(header, Close)
        codes.add(header.code)
    assert codes <= {"unknown_session", "too_fast", "unknown_peer"}
    client.send(pack(Data(session=SESSION, sequence=0), [b"undisturbed"]))
    assert bytes(receive(server).body[0]) == b"undisturbed"


def test_plain_doors_are_for_this_machine() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with (
        pytest.raises(UsageError, match=r"tcp://\*:5555 would leave this machine"),
        Broker(BrokerSettings(frontend="tcp://*:5555"), context),
    ):
        pass
    elsewhere = BrokerConnection(context, Door("tcp://10.1.2.3:5555"), hello("client"))
    with elsewhere, pytest.raises(UsageError, match="would leave this machine"):
        elsewhere.open(1.0)
    context.destroy(0)
