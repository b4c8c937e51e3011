"""When to ping, and when silence is death. Times in seconds of a clock that the test turns."""

from shared.wire.heartbeat import Heartbeat


def test_a_ping_is_due_once_an_interval() -> None:
    heartbeat = Heartbeat(2.0, 10.0, now=100.0)
    assert not heartbeat.ping_due(101.9)
    assert heartbeat.ping_due(102.0)
    assert not heartbeat.ping_due(102.0)
    assert not heartbeat.ping_due(103.9)
    assert heartbeat.ping_due(104.0)


def test_after_a_pause_one_ping_is_due_and_not_one_for_each_missed() -> None:
    heartbeat = Heartbeat(2.0, 10.0, now=0.0)
    assert heartbeat.ping_due(100.0)
    assert not heartbeat.ping_due(100.0)


def test_silence_is_death_only_after_the_timeout() -> None:
    heartbeat = Heartbeat(2.0, 10.0, now=0.0)
    assert not heartbeat.expired(10.0)
    assert heartbeat.expired(10.1)


def test_anything_heard_is_a_sign_of_life() -> None:
    heartbeat = Heartbeat(2.0, 10.0, now=0.0)
    heartbeat.heard(9.0)
    assert not heartbeat.expired(19.0)
    assert heartbeat.expired(19.1)


def test_pinging_is_no_sign_of_the_brokers_life() -> None:
    heartbeat = Heartbeat(2.0, 10.0, now=0.0)
    assert heartbeat.ping_due(9.0)
    assert heartbeat.expired(10.1)


def test_hearing_does_not_put_off_the_next_ping() -> None:
    heartbeat = Heartbeat(2.0, 10.0, now=0.0)
    heartbeat.heard(1.9)
    assert heartbeat.ping_due(2.0)
