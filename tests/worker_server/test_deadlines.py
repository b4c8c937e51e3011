"""Deadlines that adapt: the arithmetic, and both kinds of rounds that wait by them, with made-up time."""

from collections.abc import Sequence
from typing import Any

import pytest

from worker_server.deadlines import FLOOR_S, LEAST, WINDOW, Deadlines, Kind
from worker_server.lockstep import Lockstep
from worker_server.plain_fedavg import PlainFedavg
from worker_server.rounds import Plan, Rounds
from worker_server.work import Aggregate, RunForward, Ticket

NAMES = ("anna", "berta", "clara", "dora")
LIMIT = 100.0


def ticket(name: str, request: int = 1, **fields: Any) -> Ticket:
    return Ticket(name.encode(), name, request, None, **fields)


def plan(**settings: Any) -> Plan:
    values: dict[str, Any] = {"clients": 4, "rounds": 40, "local_steps": 40, "deadline_s": LIMIT, "quorum": 2}
    return Plan(**values | {"deadline_mads": 3, **settings})


def test_it_is_the_median_and_so_many_deviations() -> None:
    deadlines = Deadlines(LIMIT, 3)
    for _ in range(LEAST):
        deadlines.record("forward", [0, 4, 6, 7, 90])
    assert deadlines.of("forward") == 6 + 3 * 2  # |x - 6| = 6, 2, 0, 1, 84
    assert deadlines.of("backward") == LIMIT


def test_with_few_observations_the_limit_stands() -> None:
    deadlines = Deadlines(LIMIT, 3)
    for _ in range(LEAST - 1):
        deadlines.record("update", [0, 2])
        assert deadlines.of("update") == LIMIT
    deadlines.record("update", [5])  # who is alone waits for nobody
    assert deadlines.of("update") == LIMIT
    deadlines.record("update", [0, 2])
    assert deadlines.of("update") == 1 + 3 * 1


def test_it_is_never_below_the_floor_nor_above_the_limit() -> None:
    deadlines = Deadlines(LIMIT, 3)
    for _ in range(LEAST):
        deadlines.record("forward", [0, 1e-3, 2e-3])
        deadlines.record("backward", [0, 80, 160])
    assert (deadlines.of("forward"), deadlines.of("backward")) == (FLOOR_S, LIMIT)


def test_only_recent_times_count() -> None:
    deadlines = Deadlines(LIMIT, 3)
    for _ in range(100):
        deadlines.record("forward", [0, 20, 40])
    for _ in range(WINDOW):
        deadlines.record("forward", [0, 2, 4])
    assert deadlines.of("forward") == 2 + 3 * 2


def test_without_the_setting_it_does_not_move() -> None:
    deadlines = Deadlines(LIMIT)
    for _ in range(50):
        deadlines.record("forward", [0, 1, 2])
    assert deadlines.of("forward") == LIMIT


def step(rounds: Lockstep, now: float, times: dict[str, float]) -> float:
    """One step in which each member's request comes `times` after the first; when it was over."""
    ordered = sorted(times.items(), key=lambda pair: pair[1])
    for name, after in ordered:
        rounds.forward(ticket(name, 5), rounds.round, rounds.step, 0, now + after)
    rounds.forward_done(rounds.cohorts[0].number, now + 50)
    for name, after in ordered:
        rounds.backward(ticket(name, 6, forward=5), now + 60 + after)
    rounds.backward_done(rounds.cohorts[0].number, now + 90)
    return now + 100


TIMES = {"anna": 0.0, "berta": 2.0, "clara": 4.0, "dora": 6.0}


def lockstep(**settings: Any) -> Lockstep:
    rounds = Lockstep(plan(**settings))
    for name in NAMES:
        rounds.joined(ticket(name), 0)
    return rounds


def test_in_lockstep_a_late_member_is_left_behind_when_the_others_times_say_so() -> None:
    rounds, now = lockstep(), 0.0
    for _ in range(LEAST + 1):  # the round's first forward is of a kind of its own
        now = step(rounds, now, TIMES)
    for name in NAMES[:3]:
        rounds.forward(ticket(name, 5), 0, rounds.step, 0, now)
    due = 3 + 3 * 2  # median and deviation of 0, 2, 4, 6
    assert rounds.deadline() == now + due
    assert rounds.tick(now + due - 0.1) == []
    (work,) = rounds.tick(now + due)
    assert isinstance(work, RunForward)
    assert [t.client for t in work.tickets] == [*NAMES[:3]]
    assert rounds.joined(ticket("dora", 9), now + due) == []  # for the next round, as ever


def test_a_deadline_that_lets_go_of_too_many_grows_again() -> None:
    """All slow down at once: some are left behind, and counted with the time that they were waited for."""
    rounds, now = lockstep(quorum=1), 0.0
    for _ in range(LEAST + 1):
        now = step(rounds, now, TIMES)
    before = rounds.deadlines.of("forward")
    for _ in range(6):
        rounds.deadlines.give_up("forward", [0.0], before, 3)
    assert rounds.deadlines.of("forward") > before


class Noting(Deadlines):
    """Keeps what was recorded."""

    def __init__(self) -> None:
        super().__init__(LIMIT, 3)
        self.noted: list[tuple[Kind, list[float]]] = []

    def record(self, kind: Kind, times: Sequence[float]) -> None:
        self.noted.append((kind, list(times)))
        super().record(kind, times)


def test_what_is_given_up_is_recorded_once() -> None:
    rounds, now = lockstep(), 0.0
    rounds.deadlines = noting = Noting()
    for _ in range(LEAST + 1):
        now = step(rounds, now, TIMES)
    noting.noted.clear()
    for name in NAMES[:3]:
        rounds.forward(ticket(name, 5), 0, rounds.step, 0, now)
    rounds.tick(now + 9)
    assert [(kind, times) for kind, times in noting.noted if times] == [("forward", [0.0, 0.0, 0.0, 9.0])]


def test_the_first_forward_of_a_round_has_times_of_its_own() -> None:
    """Some evaluate for longer before it: that makes nobody late."""
    rounds, now = lockstep(), 0.0
    for _ in range(LEAST + 1):
        now = step(rounds, now, TIMES)
    assert rounds.deadlines.of("forward") < LIMIT
    assert rounds.deadlines.of("first") == LIMIT


@pytest.mark.parametrize("mads", [3, None])
def test_in_plain_fedavg_updates_are_waited_for_so(mads: float | None) -> None:
    rounds: Rounds = PlainFedavg(plan(deadline_mads=mads))
    for name in NAMES:
        rounds.joined(ticket(name), 0)
    now = 0.0
    for number in range(LEAST):
        for name, after in TIMES.items():
            rounds.update(ticket(name, 5), number, now + after)
        rounds.aggregation_done()
        now += 100
    for name in NAMES[:3]:
        rounds.update(ticket(name, 5), LEAST, now)
    due = 9 if mads else LIMIT
    assert rounds.deadline() == now + due
    assert rounds.tick(now + due - 0.1) == []
    (work,) = rounds.tick(now + due)
    assert isinstance(work, Aggregate)
    assert [t.client for t in work.updates] == [*NAMES[:3]]
