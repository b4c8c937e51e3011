"""Who gets a session, and that nothing in OPEN or ACCEPT can be changed on the way."""

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shared.errors import HandshakeError, Refused, SealError
from shared.secure.handshake import MAX_PAYLOAD_BYTES, ClientHandshake, ServerHandshake
from shared.secure.noise import IKHFS, HandshakeState, public_bytes
from shared.secure.records import Channel
from shared.wire.envelope import Accept, Data, Envelope, Open, pack, parse

CLIENT = X25519PrivateKey.from_private_bytes(bytes([1]) * 32)
SERVER = X25519PrivateKey.from_private_bytes(bytes([2]) * 32)
STRANGER = X25519PrivateKey.from_private_bytes(bytes([3]) * 32)
OPEN = Open(version=1, session=b"s" * 16, server=b"v" * 32, job=b"j" * 32)
NAMES = {public_bytes(CLIENT): "alice"}


def envelope(client: ClientHandshake, header: Open = OPEN) -> Envelope:
    """The OPEN message of `client` as a server receives it."""
    return parse(pack(header, [client.message_1]).frames())


def client_and_server(client_key: X25519PrivateKey = CLIENT) -> tuple[ClientHandshake, ServerHandshake]:
    return ClientHandshake(client_key, public_bytes(SERVER), OPEN), ServerHandshake(SERVER, NAMES.get)


def assert_connected(client: Channel, server: Channel) -> None:
    for sender, receiver in ((client, server), (server, client)):
        assert receiver.open(sender.seal([b"hidden"])) == [b"hidden"]


def test_both_sides_get_one_channel() -> None:
    client, server = client_and_server()
    assert server.receive(envelope(client)) == ("alice", public_bytes(CLIENT))
    message_2, server_channel = server.accept()
    client_channel, payload = client.finish(message_2)
    assert payload == b""
    assert_connected(client_channel, server_channel)


def test_records_carry_the_session_of_open() -> None:
    client, server = client_and_server()
    server.receive(envelope(client))
    message_2, server_channel = server.accept()
    client_channel, _ = client.finish(message_2)
    for channel in (client_channel, server_channel):
        assert channel.seal([b""]).header == Data(session=OPEN.session, sequence=0)


def test_an_attestation_reaches_the_client() -> None:
    client, server = client_and_server()
    server.receive(envelope(client))
    attestation = b"a" * MAX_PAYLOAD_BYTES
    message_2, _ = server.accept(attestation)
    assert attestation not in message_2
    assert client.finish(message_2)[1] == attestation


def test_an_attestation_has_a_limit() -> None:
    client, server = client_and_server()
    server.receive(envelope(client))
    with pytest.raises(HandshakeError, match="16384"):
        server.accept(b"a" * (MAX_PAYLOAD_BYTES + 1))
    client.finish(server.accept()[0])


def test_a_client_holds_its_server_to_that_limit() -> None:
    client, _ = client_and_server()
    server = HandshakeState(IKHFS, initiator=False, prologue=pack(OPEN).raw_header, static=SERVER)
    server.read_message(client.message_1)
    with pytest.raises(HandshakeError, match="more than any attestation"):
        client.finish(server.write_message(b"a" * (MAX_PAYLOAD_BYTES + 1)))


def test_a_stranger_is_refused_before_anything_is_made() -> None:
    client, server = client_and_server(STRANGER)
    with pytest.raises(Refused, match="not admitted") as refused:
        server.receive(envelope(client))
    assert refused.value.reason == "unknown_client"
    with pytest.raises(HandshakeError, match="no OPEN"):
        server.accept()


def test_the_allow_list_is_asked_about_the_authenticated_key() -> None:
    asked: list[bytes] = []

    def admitted(public: bytes) -> str | None:
        asked.append(public)
        return "alice"

    client = ClientHandshake(CLIENT, public_bytes(SERVER), OPEN)
    server = ServerHandshake(SERVER, admitted)
    broken = pack(OPEN, [client.message_1[:-1] + bytes([client.message_1[-1] ^ 1])])
    with pytest.raises(HandshakeError):
        server.receive(broken)
    assert asked == []
    server.receive(envelope(client))
    assert asked == [public_bytes(CLIENT)]


def test_a_server_without_the_pinned_key_learns_nothing_and_cannot_answer() -> None:
    client = ClientHandshake(CLIENT, public_bytes(SERVER), OPEN)
    with pytest.raises(HandshakeError):
        ServerHandshake(STRANGER, NAMES.get).receive(envelope(client))


def test_a_client_that_pins_another_key_does_not_connect() -> None:
    client = ClientHandshake(CLIENT, public_bytes(STRANGER), OPEN)
    with pytest.raises(HandshakeError):
        ServerHandshake(SERVER, NAMES.get).receive(envelope(client))


@pytest.mark.parametrize(
    "change",
    [{"version": 0}, {"session": b"t" * 16}, {"server": b"w" * 32}, {"job": b"k" * 32}],
    ids=["version", "session", "server", "job"],
)
def test_a_changed_field_of_open_is_found_and_changes_nothing(change: dict[str, int | bytes]) -> None:
    client, server = client_and_server()
    with pytest.raises(HandshakeError):
        server.receive(envelope(client, OPEN.model_copy(update=change)))
    server.receive(envelope(client))
    message_2, server_channel = server.accept()
    assert_connected(client.finish(message_2)[0], server_channel)


def test_the_same_header_in_other_bytes_is_found() -> None:
    """The prologue is what came, not what it means: here the same map in another order."""
    client, server = client_and_server()
    other = msgpack.packb(dict(reversed(OPEN.model_dump().items())))
    with pytest.raises(HandshakeError):
        server.receive(parse([b"O", other, client.message_1]))


@pytest.mark.parametrize("where", [0, 31, 32, 1135, -17, -1])
def test_a_changed_answer_is_found_and_the_right_one_still_connects(where: int) -> None:
    client, server = client_and_server()
    server.receive(envelope(client))
    message_2, server_channel = server.accept()
    changed = bytearray(message_2)
    changed[where] ^= 1
    with pytest.raises(HandshakeError, match="does not fit") as error:
        client.finish(bytes(changed))
    assert error.value.hint is not None
    assert "fingerprint" in error.value.hint
    assert_connected(client.finish(message_2)[0], server_channel)


def test_the_answer_to_another_open_does_not_fit() -> None:
    first, server_1 = client_and_server()
    second, server_2 = client_and_server()
    server_1.receive(envelope(first))
    server_2.receive(envelope(second))
    message_2, _ = server_1.accept()
    with pytest.raises(HandshakeError):
        second.finish(message_2)
    second.finish(server_2.accept()[0])


def test_a_replayed_open_gives_other_keys() -> None:
    """Whoever recorded OPEN gets an answer that only the client can read, and no record of his opens."""
    client, server = client_and_server()
    opened = envelope(client)
    server.receive(opened)
    message_2, _ = server.accept()
    channel, _ = client.finish(message_2)
    replay = ServerHandshake(SERVER, NAMES.get)
    replay.receive(opened)
    _, replayed_channel = replay.accept()
    with pytest.raises(SealError):
        replayed_channel.open(channel.seal([b"hidden"]))


def test_recorded_traffic_does_not_open_with_the_static_keys() -> None:
    """A later thief of both static keys and the recording cannot read message 2, nor make the session's keys."""
    client, server = client_and_server()
    opened = envelope(client)
    server.receive(opened)
    message_2, _ = server.accept()
    recorded = client.finish(message_2)[0].seal([b"hidden"])

    as_client = ClientHandshake(CLIENT, public_bytes(SERVER), OPEN)
    with pytest.raises(HandshakeError):
        as_client.finish(message_2)
    as_server = ServerHandshake(SERVER, NAMES.get)
    as_server.receive(opened)
    _, channel = as_server.accept()
    with pytest.raises(SealError):
        channel.open(recorded)


@pytest.mark.parametrize(
    "wrong",
    [
        pack(Accept(session=b"s" * 16), [b"message"]),
        pack(OPEN, [b"message", b"and another"]),
        pack(OPEN),
        pack(OPEN, [b""]),
    ],
    ids=["not OPEN", "two frames", "no frame", "empty"],
)
def test_what_is_no_open_message_is_refused(wrong: Envelope) -> None:
    client, server = client_and_server()
    with pytest.raises(HandshakeError):
        server.receive(wrong)
    server.receive(envelope(client))


def test_message_1_has_no_payload() -> None:
    state = HandshakeState(
        IKHFS,
        initiator=True,
        prologue=pack(OPEN).raw_header,
        static=CLIENT,
        remote_static=public_bytes(SERVER),
    )
    with pytest.raises(HandshakeError, match="payload"):
        ServerHandshake(SERVER, NAMES.get).receive(pack(OPEN, [state.write_message(b"early")]))


def test_one_open_is_accepted_once() -> None:
    client, server = client_and_server()
    server.receive(envelope(client))
    server.accept()
    with pytest.raises(HandshakeError, match="no OPEN"):
        server.accept()


def test_a_finished_client_takes_no_second_answer() -> None:
    client, server = client_and_server()
    server.receive(envelope(client))
    message_2, _ = server.accept()
    client.finish(message_2)
    with pytest.raises(HandshakeError):
        client.finish(message_2)
