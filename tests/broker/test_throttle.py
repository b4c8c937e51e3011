"""Who sends too much is held up, alone and in order; who sends far too much is dropped."""

from broker.throttle import Rate, Throttle


def test_a_second_s_worth_passes_at_once_and_the_rest_in_time() -> None:
    throttle: Throttle[int] = Throttle(Rate(messages=2, bytes=1000, waiting=10))
    assert [throttle.take("a", 1, number, 0.0) for number in range(5)] == [True, True, False, False, False]
    assert throttle.take("b", 1, 9, 0.0) is True
    assert throttle.due(0.4) == []
    assert throttle.due(0.5) == [2]
    assert throttle.due(10.0) == [3, 4]
    assert not throttle.holds


def test_bytes_count_too_and_a_large_message_passes_once() -> None:
    throttle: Throttle[str] = Throttle(Rate(messages=100, bytes=10, waiting=10))
    assert throttle.take("a", 50, "large", 0.0) is True
    assert throttle.take("a", 1, "next", 0.1) is False
    assert throttle.due(3.9) == []
    assert throttle.due(4.2) == ["next"]


def test_nothing_overtakes_what_waits() -> None:
    throttle: Throttle[int] = Throttle(Rate(messages=1, bytes=1000, waiting=10))
    throttle.take("a", 1, 0, 0.0)
    assert throttle.take("a", 1, 1, 0.0) is False
    assert throttle.take("a", 1, 2, 5.0) is False  # there would be room, but 1 waits
    assert throttle.due(5.0) == [1]
    assert throttle.due(6.0) == [2]


def test_too_many_waiting_is_said_and_who_is_gone_is_forgotten() -> None:
    throttle: Throttle[int] = Throttle(Rate(messages=1, bytes=1000, waiting=2))
    assert [throttle.take("a", 1, number, 0.0) for number in range(4)] == [True, False, False, None]
    throttle.forget({"b"}.__contains__)
    assert not throttle.holds
    assert throttle.due(100.0) == []


def test_a_clock_that_stands_still_or_goes_back_gives_nothing_away() -> None:
    throttle: Throttle[int] = Throttle(Rate(messages=1, bytes=1000, waiting=2))
    throttle.take("a", 1, 0, 10.0)
    assert throttle.take("a", 1, 1, 5.0) is False
    assert throttle.due(5.5) == []
