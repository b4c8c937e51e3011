"""Whatever workers do in whatever order, the broker's tables agree and a session's messages stay within it."""

from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from broker.routing import Peer, Router, Send
from broker.settings import BrokerSettings
from shared.wire.envelope import Accept, Close, Data, Envelope, Header, Hello, Open, Ping, pack

CLIENTS = [Peer("client", name) for name in (b"a", b"b", b"c")]
SERVERS = [Peer("server", name) for name in (b"a", b"s", b"t")]
IDENTITIES = [bytes([n]) * 32 for n in range(2)]
SESSIONS = [bytes([n]) * 16 for n in range(4)]
LIMITS = BrokerSettings(heartbeat_s=2, timeout_s=10, max_peers=5, max_sessions_per_client=2)


@dataclass(frozen=True)
class Says:
    peer: Peer
    header: Header


@dataclass(frozen=True)
class Vanishes:
    peer: Peer


@dataclass(frozen=True)
class Waits:
    seconds: float


Action = Says | Vanishes | Waits

peers = st.sampled_from(CLIENTS + SERVERS)
sessions = st.sampled_from(SESSIONS)
identities = st.sampled_from(IDENTITIES)
greetings = st.one_of(
    st.builds(Says, st.sampled_from(CLIENTS), st.just(Hello(version=1, role="client"))),
    st.builds(
        Says,
        st.sampled_from(SERVERS),
        st.builds(
            Hello,
            version=st.just(1),
            role=st.just("server"),
            identity=identities,
            replica=st.integers(0, 1),
            replicas=st.just(2),
        ),
    ),
)
headers = st.one_of(
    st.just(Ping()),
    st.builds(Open, version=st.just(1), session=sessions, server=identities, job=st.just(b"j" * 32)),
    st.builds(Accept, session=sessions),
    st.builds(Data, session=sessions, sequence=st.just(0)),
    st.builds(Close, session=st.none() | sessions, code=st.just("done"), message=st.just("")),
)
actions: st.SearchStrategy[Action] = st.one_of(
    greetings,
    st.builds(Says, peers, headers),
    st.builds(Says, peers, headers),
    st.builds(Vanishes, peers),
    st.builds(Waits, st.sampled_from([0.5, 4.0, 11.0])),
)


def envelope_of(header: Header) -> Envelope:
    return pack(header, [b"sealed"] if isinstance(header, Open | Accept | Data) else [])


def assert_tables_agree(router: Router) -> None:
    for session_id, session in router.sessions.items():
        assert (session.client.side, session.server.side) == ("client", "server")
        for peer in (session.client, session.server):
            assert session_id in router.peers[peer].sessions
    for peer, known in router.peers.items():
        assert all(peer in (router.sessions[s].client, router.sessions[s].server) for s in known.sessions)
        assert (known.identity is not None) == (peer.side == "server")
        assert known.identity is None or router.servers[known.identity][known.replica] == peer
        assert peer.side == "server" or len(known.sessions) <= LIMITS.max_sessions_per_client
    assert all(
        (router.peers[peer].identity, router.peers[peer].replica) == (identity, replica)
        for identity, replicas in router.servers.items()
        for replica, peer in replicas.items()
    )
    assert len(router.peers) <= LIMITS.max_peers
    assert router.connections == Counter(known.guest for known in router.peers.values())


def assert_stays_within_its_session(router: Router, sender: Peer, header: Header, sends: list[Send]) -> None:
    """A message for the other end went to it alone; anything else to say is said by the broker itself."""
    for send in sends:
        if isinstance(send.envelope.header, Accept | Data | Open):
            session = router.sessions[send.envelope.header.session]
            assert {sender, send.to} == {session.client, session.server}
            assert send.envelope.header == header
            assert sends == [send]


@settings(max_examples=150, deadline=None)
@given(st.lists(actions, max_size=40))
def test_the_tables_agree_after_anything(history: list[Action]) -> None:
    router, now = Router(LIMITS), 0.0
    for peer, identity in ((CLIENTS[0], None), (SERVERS[0], IDENTITIES[0])):
        router.handle(peer, pack(Hello(version=1, role=peer.side, identity=identity)).frames(), now)
    for action in history:
        if isinstance(action, Says):
            sends = router.handle(action.peer, envelope_of(action.header).frames(), now)
            assert_stays_within_its_session(router, action.peer, action.header, sends)
        elif isinstance(action, Vanishes):
            router.lost(action.peer)
        else:
            now += action.seconds
            router.tick(now)
            assert all(now - known.heard <= LIMITS.timeout_s for known in router.peers.values())
        assert_tables_agree(router)
