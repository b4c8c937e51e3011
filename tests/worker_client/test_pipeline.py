"""The order of batches under way."""

import pytest

from worker_client.pipeline import schedule


@pytest.mark.parametrize("batches", [1, 2, 5, 8])
@pytest.mark.parametrize("in_flight", [1, 2, 3, 4, 16])
def test_every_batch_is_sent_turned_and_finished_in_order_and_no_more_are_under_way(
    batches: int, in_flight: int
) -> None:
    actions = list(schedule(batches, in_flight))
    for kind in ("send", "turn", "finish"):
        assert [index for action, index in actions if action == kind] == list(range(batches))
    for index in range(batches):
        assert actions.index(("send", index)) < actions.index(("turn", index)) < actions.index(("finish", index))
    under_way = 0
    for action, _ in actions:
        under_way += {"send": 1, "turn": 0, "finish": -1}[action]
        assert 0 <= under_way <= in_flight


def test_one_at_a_time_is_as_plain_as_it_gets() -> None:
    actions = [("send", 0), ("turn", 0), ("finish", 0), ("send", 1), ("turn", 1), ("finish", 1)]
    assert list(schedule(2, 1)) == actions


def test_on_a_slow_link_requests_are_half_the_window_apart_from_their_turns() -> None:
    """Four under way: when batch 4 is sent, batch 0 is finished and batch 2 is turned next."""
    actions = list(schedule(8, 4))
    place = actions.index(("send", 4))
    assert actions[place - 1] == ("finish", 0)
    assert actions[place + 1] == ("turn", 2)
