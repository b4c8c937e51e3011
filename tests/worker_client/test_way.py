"""When a client tries again after its connection broke, and when it gives up."""

from datetime import UTC, datetime

import pytest

from shared.errors import ConnectionFailed, HandshakeError
from shared.identity import generate_identity
from shared.invitations import BrokerAt, Invitation
from worker_client import way as module
from worker_client.way import LONGEST_PAUSE_S, Way

BROKEN = ConnectionFailed("the server is gone")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def way() -> Way:
    invitation = Invitation(
        id="0" * 32,
        client="anna",
        brokers=[BrokerAt(address="tcp://localhost:1")],
        server="gpu",
        server_public_key="0" * 64,
        job="0" * 64,
        expires_at=datetime.now(UTC),
    )
    return Way(invitation, generate_identity("anna"), 1.0, 60.0)


def test_pauses_grow_and_the_patience_ends(way: Way, clock: Clock) -> None:
    def try_on() -> None:
        for _ in range(100):
            way.broke(BROKEN, once_there=True)

    with pytest.raises(ConnectionFailed) as given_up:
        try_on()
    assert given_up.value is BROKEN
    assert clock.pauses[:6] == [0.5, 1.0, 2.0, 4.0, 8.0, LONGEST_PAUSE_S]
    assert 60.0 < clock.now <= 60.0 + LONGEST_PAUSE_S


def test_progress_gives_all_the_time_again(way: Way, clock: Clock) -> None:
    for _ in range(20):
        for _ in range(4):
            way.broke(BROKEN, once_there=True)
        way.progress()
    assert clock.now > 100.0
    assert max(clock.pauses) == 4.0


def test_who_was_never_there_or_is_turned_away_does_not_wait(way: Way, clock: Clock) -> None:
    with pytest.raises(ConnectionFailed):
        way.broke(BROKEN, once_there=False)
    with pytest.raises(HandshakeError):
        way.broke(HandshakeError("the broker does not admit this key"), once_there=True)
    assert clock.pauses == []
