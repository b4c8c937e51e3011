"""How connections and sessions end, without sockets: who is told what, and that nobody else is."""

import pytest
from pydantic import ValidationError

from broker.routing import Peer, Router, Send
from broker.settings import BrokerSettings
from shared import PROTOCOL_VERSION
from shared.wire.envelope import Close, Data, Frame, Header, Hello, Open, Ping, Pong, pack

CLIENT, OTHER, SERVER = Peer("client", b"c"), Peer("client", b"o"), Peer("server", b"s")
IDENTITY, FIRST, SECOND = b"i" * 32, b"1" * 16, b"2" * 16


def hello(peer: Peer) -> list[Frame]:
    identity = IDENTITY if peer.side == "server" else None
    return pack(Hello(version=PROTOCOL_VERSION, role=peer.side, identity=identity)).frames()


def data(session: bytes) -> list[Frame]:
    return pack(Data(session=session, sequence=0), [b"sealed"]).frames()


def opening(session: bytes) -> list[Frame]:
    return pack(Open(version=1, session=session, server=IDENTITY, job=b"j" * 32), [b"message 1"]).frames()


@pytest.fixture
def router() -> Router:
    """One server, two clients, a session each."""
    made = Router(BrokerSettings(timeout_s=15))
    for peer in (SERVER, CLIENT, OTHER):
        made.handle(peer, hello(peer), 0)
    made.handle(CLIENT, opening(FIRST), 0)
    made.handle(OTHER, opening(SECOND), 0)
    return made


def told(sends: list[Send]) -> list[tuple[Peer, bytes | None, str]]:
    closings = [(send.to, send.envelope.header) for send in sends]
    return [(to, header.session, header.code) for to, header in closings if isinstance(header, Close)]


def still_open(router: Router, session: bytes, client: Peer) -> bool:
    (send,) = router.handle(client, data(session), 0)
    return send.to == SERVER


def test_a_lost_server_is_told_to_every_client_of_it(router: Router) -> None:
    assert told(router.lost(SERVER)) == [(CLIENT, FIRST, "server_gone"), (OTHER, SECOND, "server_gone")]
    assert told(router.handle(CLIENT, data(FIRST), 0)) == [(CLIENT, FIRST, "unknown_session")]
    assert told(router.handle(CLIENT, opening(b"3" * 16), 0)) == [(CLIENT, b"3" * 16, "no_such_server")]


def test_a_lost_client_ends_its_own_sessions_only(router: Router) -> None:
    assert told(router.lost(CLIENT)) == [(SERVER, FIRST, "client_gone")]
    assert still_open(router, SECOND, OTHER)


def test_who_is_lost_twice_is_told_once(router: Router) -> None:
    router.lost(CLIENT)
    assert router.lost(CLIENT) == []
    assert router.counters["peers_gone"] == 1


def test_a_lost_worker_must_greet_again(router: Router) -> None:
    router.lost(CLIENT)
    assert told(router.handle(CLIENT, data(FIRST), 0)) == [(CLIENT, None, "unknown_peer")]
    router.handle(CLIENT, hello(CLIENT), 0)
    (answer,) = router.handle(CLIENT, pack(Ping()).frames(), 0)
    assert isinstance(answer.envelope.header, Pong)


def test_greeting_again_ends_the_sessions_from_before(router: Router) -> None:
    closing, welcome = router.handle(CLIENT, hello(CLIENT), 0)
    assert told([closing]) == [(SERVER, FIRST, "client_gone")]
    assert welcome.to == CLIENT
    assert still_open(router, SECOND, OTHER)


def test_the_old_connection_of_a_restarted_server_is_gone_and_its_end_disturbs_nobody(router: Router) -> None:
    again = Peer("server", b"again")
    router.handle(again, hello(again), 0)
    assert told(router.handle(SERVER, pack(Ping()).frames(), 0)) == [(SERVER, None, "unknown_peer")]
    router.lost(SERVER)
    (send,) = router.handle(CLIENT, opening(b"3" * 16), 0)
    assert send.to == again


@pytest.mark.parametrize("message", [data(FIRST), pack(Ping()).frames(), opening(b"3" * 16), data(b"4" * 16)])
def test_any_rightly_formed_message_is_a_sign_of_life(router: Router, message: list[Frame]) -> None:
    router.handle(CLIENT, message, 10)
    router.handle(SERVER, pack(Ping()).frames(), 10)
    assert told(router.tick(20)) == [(SERVER, SECOND, "client_gone"), (OTHER, None, "timed_out")]
    assert still_open(router, FIRST, CLIENT)


def test_garbage_is_no_sign_of_life(router: Router) -> None:
    router.handle(CLIENT, [b"?"], 10)
    assert (CLIENT, None, "timed_out") in told(router.tick(15.1))


def test_when_all_are_silent_all_are_gone_and_no_session_is_ended_twice(router: Router) -> None:
    ended = [session for _, session, _ in told(router.tick(100)) if session is not None]
    assert sorted(ended) == [FIRST, SECOND]
    assert (router.peers, router.servers, router.sessions) == ({}, {}, {})
    assert router.tick(200) == []


def test_a_closed_id_can_be_used_again_and_a_used_one_stays_with_its_owner(router: Router) -> None:
    assert told(router.handle(OTHER, opening(FIRST), 0)) == [(OTHER, FIRST, "session_in_use")]
    assert told(router.handle(CLIENT, opening(FIRST), 0)) == [(CLIENT, FIRST, "session_in_use")]
    assert still_open(router, FIRST, CLIENT)
    router.handle(CLIENT, pack(Close(session=FIRST, code="done", message="")).frames(), 0)
    (send,) = router.handle(OTHER, opening(FIRST), 0)
    assert send.to == SERVER


@pytest.mark.parametrize("session", [SECOND, b"3" * 16])
def test_closing_what_is_not_yours_changes_nothing_and_is_counted(router: Router, session: bytes) -> None:
    before = dict(router.sessions)
    assert router.handle(CLIENT, pack(Close(session=session, code="done", message="")).frames(), 0) == []
    assert router.sessions == before
    assert router.counters["refused_not_yours"] == 1


def test_a_leaving_server_ends_its_sessions(router: Router) -> None:
    leaving = pack(Close(code="leaving", message="")).frames()
    assert told(router.handle(SERVER, leaving, 0)) == [(CLIENT, FIRST, "server_gone"), (OTHER, SECOND, "server_gone")]
    assert told(router.handle(CLIENT, opening(b"3" * 16), 0)) == [(CLIENT, b"3" * 16, "no_such_server")]


def test_an_ended_session_gives_its_place_back() -> None:
    router = Router(BrokerSettings(max_sessions_per_client=1))
    for peer in (SERVER, CLIENT):
        router.handle(peer, hello(peer), 0)
    router.handle(CLIENT, opening(FIRST), 0)
    router.handle(SERVER, pack(Close(session=FIRST, code="done", message="")).frames(), 0)
    (send,) = router.handle(CLIENT, opening(SECOND), 0)
    assert send.to == SERVER


@pytest.mark.parametrize(("sender", "slow"), [(CLIENT, SERVER), (SERVER, CLIENT)])
def test_a_full_queue_ends_one_session_and_is_told_to_the_sender_only(router: Router, sender: Peer, slow: Peer) -> None:
    (send,) = router.handle(sender, data(FIRST), 0)
    assert send.to == slow
    assert told(router.undeliverable(send)) == [(sender, FIRST, "peer_too_slow")]
    assert router.undeliverable(send) == []
    assert told(router.handle(slow, data(FIRST), 0)) == [(slow, FIRST, "unknown_session")]
    assert still_open(router, SECOND, OTHER)


@pytest.mark.parametrize(
    "header", [Pong(), Close(code="unknown_peer", message=""), Close(code="x", session=b"9" * 16, message="")]
)
def test_an_undeliverable_answer_ends_nothing(router: Router, header: Header) -> None:
    assert router.undeliverable(Send(CLIENT, pack(header))) == []
    assert still_open(router, FIRST, CLIENT)


def test_frames_are_passed_on_without_copies(router: Router) -> None:
    body = [memoryview(bytes(1000)), memoryview(b"")]
    (send,) = router.handle(CLIENT, pack(Data(session=FIRST, sequence=0), body).frames(), 0)
    assert all(after is before for after, before in zip(send.envelope.frames()[2:], body, strict=True))


def test_a_refused_version_names_both() -> None:
    message = pack(Hello(version=PROTOCOL_VERSION + 1, role="client")).frames()
    (send,) = Router(BrokerSettings()).handle(CLIENT, message, 0)
    assert isinstance(send.envelope.header, Close)
    assert send.envelope.header.code == "version"
    for version in (PROTOCOL_VERSION, PROTOCOL_VERSION + 1):
        assert str(version) in send.envelope.header.message


@pytest.mark.parametrize(
    "wrong",
    [
        {"heartbeat_s": 15, "timeout_s": 15},
        {"heartbeat_s": 0},
        {"timeout_s": float("inf")},
        {"timeout_s": 3601},
        {"max_peers": 0},
        {"high_water_mark": 0},
        {"max_frame_bytes": -1},
        {"heartbeat": 1},
    ],
)
def test_wrong_settings_are_refused_when_made(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        BrokerSettings.model_validate(wrong)


def test_who_sends_more_than_is_answered_loses_that_session_alone(router: Router) -> None:
    most = router.settings.max_unanswered
    for _ in range(2):
        for _ in range(most):
            assert router.handle(CLIENT, data(FIRST), 0)[0].to == SERVER
        router.handle(SERVER, data(FIRST), 0)  # any answer counts
    for _ in range(most):
        router.handle(CLIENT, data(FIRST), 0)
    sends = router.handle(CLIENT, data(FIRST), 0)
    assert told(sends) == [(CLIENT, FIRST, "too_many_unanswered"), (SERVER, FIRST, "client_gone")]
    assert router.counters["refused_too_many_unanswered"] == 1
    assert CLIENT in router.peers
    assert still_open(router, SECOND, OTHER)
