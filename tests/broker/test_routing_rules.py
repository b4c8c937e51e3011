"""The broker's rules, without sockets: who may say what, and what becomes of it."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.routing import Peer, Router, Send
from broker.settings import BrokerSettings
from shared import PROTOCOL_VERSION
from shared.wire.envelope import Accept, Close, Data, Header, Hello, Open, Ping, Pong, Welcome, pack

CLIENT, OTHER, SERVER = Peer("client", b"c"), Peer("client", b"o"), Peer("server", b"s")
IDENTITY, SESSION, JOB = b"i" * 32, b"x" * 16, b"j" * 32


def frames(header: Header, *body: bytes) -> list[Any]:
    return pack(header, list(body)).frames()


def opening(session: bytes = SESSION, server: bytes = IDENTITY) -> list[Any]:
    return frames(Open(version=1, session=session, server=server, job=JOB), b"message 1")


def greeted(**limits: Any) -> Router:
    router = Router(BrokerSettings(**limits))
    for peer in (CLIENT, OTHER, SERVER):
        identity = IDENTITY if peer.side == "server" else None
        router.handle(peer, frames(Hello(version=PROTOCOL_VERSION, role=peer.side, identity=identity)), 0)
    return router


def opened() -> Router:
    router = greeted()
    router.handle(CLIENT, opening(), 0)
    return router


def code(sends: list[Send]) -> str:
    (send,) = sends
    assert isinstance(send.envelope.header, Close)
    return send.envelope.header.code


def test_a_greeting_is_answered_with_times() -> None:
    (send,) = Router(BrokerSettings()).handle(CLIENT, frames(Hello(version=1, role="client")), 0)
    assert send.to == CLIENT
    assert isinstance(send.envelope.header, Welcome)


def test_a_session_goes_between_its_two_ends_and_its_frames_untouched() -> None:
    router = greeted()
    for peer, to, message in (
        (CLIENT, SERVER, opening()),
        (SERVER, CLIENT, frames(Accept(session=SESSION), b"message 2")),
        (CLIENT, SERVER, frames(Data(session=SESSION, sequence=0), b"one", b"two")),
        (SERVER, CLIENT, frames(Data(session=SESSION, sequence=0), b"three")),
    ):
        (send,) = router.handle(peer, message, 0)
        assert send.to == to
        assert send.envelope.frames() == message
    assert router.counters["messages_up"] == router.counters["messages_down"] == 2
    assert router.counters["bytes_up"] == len(b"message 1onetwo")


@pytest.mark.parametrize(
    ("peer", "message", "refusal"),
    [
        (Peer("client", b"new"), frames(Ping()), "unknown_peer"),
        (Peer("client", b"new"), frames(Hello(version=99, role="client")), "version"),
        (Peer("client", b"new"), frames(Hello(version=1, role="server", identity=IDENTITY)), "wrong_side"),
        (Peer("server", b"new"), frames(Hello(version=1, role="server")), "wrong_side"),
        (OTHER, opening(), "session_in_use"),
        (OTHER, opening(b"y" * 16, b"n" * 32), "no_such_server"),
        (SERVER, opening(b"y" * 16), "not_yours"),
        (OTHER, frames(Data(session=SESSION, sequence=0), b"x"), "not_yours"),
        (CLIENT, frames(Accept(session=SESSION), b"x"), "not_yours"),
        (CLIENT, frames(Data(session=b"y" * 16, sequence=0), b"x"), "unknown_session"),
        (CLIENT, frames(Welcome(version=1, heartbeat_s=1.0, timeout_s=2.0)), "envelope"),
        (CLIENT, [b"D"], "frame"),
        (CLIENT, [b"?", b"\x80"], "envelope"),
        (CLIENT, [b"D", b"\xc1"], "envelope"),
        (CLIENT, [b"P", b"\x80", b"a body"], "frame"),
    ],
)
def test_what_breaks_a_rule_is_refused_and_changes_nothing(peer: Peer, message: list[Any], refusal: str) -> None:
    router = opened()
    before = copy.deepcopy((router.peers, router.sessions, router.servers))
    sends = router.handle(peer, message, 0)
    assert sends[0].to == peer
    assert code(sends) == refusal
    assert router.counters[f"refused_{refusal}"] == 1
    assert (router.peers, router.sessions, router.servers) == before


def test_limits_are_kept() -> None:
    router = greeted(max_sessions_per_client=1)
    router.handle(CLIENT, opening(), 0)
    assert code(router.handle(CLIENT, opening(b"y" * 16), 0)) == "too_many_sessions"
    full = greeted(max_peers=3)
    assert code(full.handle(Peer("client", b"new"), frames(Hello(version=1, role="client")), 0)) == "too_many_peers"


@pytest.mark.parametrize(("gone", "told", "why"), [(CLIENT, SERVER, "client_gone"), (SERVER, CLIENT, "server_gone")])
def test_a_silent_worker_is_gone_and_the_other_end_is_told(gone: Peer, told: Peer, why: str) -> None:
    router = opened()
    for peer in {CLIENT, OTHER, SERVER} - {gone}:
        (answer,) = router.handle(peer, frames(Ping()), 10)
        assert isinstance(answer.envelope.header, Pong)
    assert {type(send.envelope.header) for send in router.tick(15)} == {Pong}  # it looks whether they are there
    sends = [send for send in router.tick(15.1) if isinstance(send.envelope.header, Close)]
    assert [(send.to, send.envelope.header.code) for send in sends] == [(told, why), (gone, "timed_out")]  # type: ignore[attr-defined]
    assert router.sessions == {}
    assert gone not in router.peers


def replicated(count: int) -> tuple[Router, list[Peer]]:
    router = Router(BrokerSettings(max_sessions_per_client=16))
    replicas = [Peer("server", b"s%d" % number) for number in range(count)]
    for number, peer in enumerate(replicas):
        hello = Hello(version=PROTOCOL_VERSION, role="server", identity=IDENTITY, replica=number, replicas=count)
        router.handle(peer, frames(hello), 0)
    router.handle(CLIENT, frames(Hello(version=PROTOCOL_VERSION, role="client")), 0)
    return router, replicas


def test_sessions_go_to_the_replica_with_the_fewest_and_stay_there() -> None:
    router, (first, second, third) = replicated(3)
    sessions = [bytes([number]) * 16 for number in range(6)]
    chosen = [router.handle(CLIENT, opening(session), 0)[0].to for session in sessions[:3]]
    assert chosen == [first, second, third]
    router.handle(second, frames(Close(session=sessions[1], code="over", message="")), 0)
    assert [router.handle(CLIENT, opening(session), 0)[0].to for session in sessions[3:]] == [second, first, second]
    (data,) = router.handle(CLIENT, frames(Data(session=sessions[2], sequence=0), b"x"), 0)
    assert data.to == third


def test_a_replica_replaces_itself_alone_and_new_sessions_wait_until_all_are_there() -> None:
    router, (first, _) = replicated(2)
    router.handle(CLIENT, opening(b"x" * 16), 0)
    router.handle(CLIENT, opening(b"y" * 16), 0)
    again = Peer("server", b"again")
    hello = Hello(version=PROTOCOL_VERSION, role="server", identity=IDENTITY, replica=1, replicas=2)
    sends = router.handle(again, frames(hello), 0)
    assert code(sends[:1]) == "server_gone"
    assert router.servers == {IDENTITY: {0: first, 1: again}}
    assert list(router.sessions) == [b"x" * 16]
    router.lost(again)
    refused = router.handle(CLIENT, opening(b"z" * 16), 0)
    assert code(refused) == "no_such_server"
    assert "1 of the server's 2 replicas" in refused[0].envelope.header.message  # type: ignore[attr-defined]
    assert list(router.sessions) == [b"x" * 16]
    router.handle(again, frames(hello), 0)
    assert router.handle(CLIENT, opening(b"z" * 16), 0)[0].to == again


def test_a_server_that_connects_anew_replaces_its_old_connection() -> None:
    router = opened()
    again = Peer("server", b"s2")
    sends = router.handle(again, frames(Hello(version=1, role="server", identity=IDENTITY)), 0)
    assert code(sends[:1]) == "server_gone"
    assert sends[0].to == CLIENT
    assert router.handle(OTHER, opening(b"y" * 16), 0)[0].to == again


def test_closing_a_session_ends_it_for_both() -> None:
    router = opened()
    (send,) = router.handle(CLIENT, frames(Close(session=SESSION, code="done", message="")), 0)
    assert send.to == SERVER
    assert router.sessions == {}
    assert router.handle(OTHER, frames(Close(session=SESSION, code="done", message="")), 0) == []


def test_leaving_ends_a_workers_sessions() -> None:
    router = opened()
    assert code(router.handle(CLIENT, frames(Close(code="leaving", message="")), 0)) == "client_gone"
    assert CLIENT not in router.peers


def test_a_slow_peer_loses_the_session_and_the_sender_is_told() -> None:
    router = opened()
    (send,) = router.handle(CLIENT, frames(Data(session=SESSION, sequence=0), b"x"), 0)
    (told,) = router.undeliverable(send)
    assert (told.to, code([told])) == (CLIENT, "peer_too_slow")
    assert router.sessions == {}
    assert SERVER in router.peers


@settings(max_examples=300, deadline=None)
@given(
    peer=st.sampled_from([CLIENT, OTHER, SERVER, Peer("client", b"new"), Peer("server", b"new")]),
    message=st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([b"H", b"O", b"D", b"C", b"A"])), max_size=5),
)
def test_garbage_never_raises_and_never_disturbs_a_session(peer: Peer, message: list[Any]) -> None:
    router = opened()
    router.handle(peer, message, 0)
    (send,) = router.handle(CLIENT, frames(Data(session=SESSION, sequence=0), b"x"), 0)
    assert send.to == SERVER
