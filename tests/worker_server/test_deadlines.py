"""Deadlines that adapt: the arithmetic, and both kinds of rounds that wait by them, with made-up time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from shared.errors import DeadlineExceeded
from shared.identity import generate_identity
from shared.job import parse_job
from shared.payload.messages import Mask
from shared.secure_aggregation.client import Client
from worker_client.ring import RingPlace
from worker_server.deadlines import FLOOR_S, LEAST, WINDOW, Deadlines, Kind
from worker_server.lockstep import Lockstep
from worker_server.masking import Sums
from worker_server.plain_fedavg import PlainFedavg
from worker_server.ring import Rings, RingSum
from worker_server.rounds import MOST_TRIES, Plan, Rounds
from worker_server.work import Aggregate, Dismiss, RunForward, Ticket

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
    due = 9 if mads else LIMIT * 40  # a step's, for all local steps
    assert rounds.deadline() == now + due
    assert rounds.tick(now + due - 0.1) == []
    (work,) = rounds.tick(now + due)
    assert isinstance(work, Aggregate)
    assert [t.client for t in work.updates] == [*NAMES[:3]]


def test_who_is_late_each_time_ends_it() -> None:
    """Where all are needed, the round would be begun for ever."""
    rounds, now = PlainFedavg(plan(quorum=4, deadline_mads=None)), 0.0
    for number in range(MOST_TRIES):
        for name in NAMES:
            rounds.joined(ticket(name), now)
        for name in NAMES[:3]:
            rounds.update(ticket(name, 5), 0, now)
        now += 40 * LIMIT
        if number < MOST_TRIES - 1:
            (dismissed,) = rounds.tick(now)
            assert isinstance(dismissed, Dismiss)
    with pytest.raises(DeadlineExceeded, match=r"round 1 was begun 10 times, .* the last time dora") as stopped:
        rounds.tick(now)
    assert "cohort.deadline_s" in (stopped.value.hint or "")


@pytest.mark.parametrize("kind", [PlainFedavg, Lockstep])
def test_also_where_others_are_there_to_begin_it_at_once(kind: type[Rounds]) -> None:
    rounds = kind(plan(clients=2, quorum=2, deadline_mads=None, local_steps=1))

    def once_more(request: int) -> None:
        for name in NAMES:
            rounds.joined(ticket(name, request), request * LIMIT)
        first = next(iter(rounds.active))
        rounds.update(Ticket(first, first.decode(), 99, None), 0, request * LIMIT)
        rounds.forward(Ticket(first, first.decode(), 99, None), 0, 0, 0, request * LIMIT)
        rounds.tick((request + 1) * LIMIT)

    for request in range(1, MOST_TRIES):
        once_more(request)
    with pytest.raises(DeadlineExceeded, match=r"round 1 was begun 10 times"):
        once_more(MOST_TRIES)


def test_a_round_that_ends_may_begin_as_often_again() -> None:
    rounds, now = PlainFedavg(plan(quorum=4, deadline_mads=None)), 0.0
    for number in range(3):
        for attempt in range(MOST_TRIES):
            for name in NAMES:
                rounds.joined(ticket(name), now)
            late = attempt < MOST_TRIES - 1
            for name in NAMES[:3] if late else NAMES:
                rounds.update(ticket(name, 5), number, now)
            now += 40 * LIMIT
            if late:
                rounds.tick(now)
        rounds.aggregation_done()
    assert rounds.round == 3


@pytest.mark.parametrize("secure", ["secagg", "ring"])
def test_messages_of_a_masked_sum_have_deadlines_of_their_own(secure: str) -> None:
    """One of them is as long as what is trained; beside short ones it would be late round after round."""
    job = parse_job(
        {
            "model_name_or_path": "m",
            "training": {"parts": ["head", "tail"]},
            "cohort": {"clients": 4},
            "aggregation": {"secure": secure},
        },
        "job",
    )
    people = {name: generate_identity(name) for name in NAMES}
    made = (Rings if secure == "ring" else Sums)(job, {"w": (3,)})
    publics = {name: each.public for name, each in people.items()}
    sum: Any = made.begin(0, publics, {name: name.encode() for name in NAMES})
    assert sum.collecting == "keys"
    if isinstance(sum, RingSum):
        for name, each in people.items():
            place = RingPlace(sum.terms, sum.announcement.nonce, each)
            sum.take(name, Mask(request=1, round=0, body=place.member.advertise_key()), [])
        sum.close(NAMES)
        assert sum.collecting == "input"
        assert made.begin(1, publics, {name: name.encode() for name in NAMES}).collecting == "update"
        return
    clients = [Client(sum.terms, people[name]) for name in NAMES]
    bodies: list[Any] = [client.advertise_keys() for client in clients]
    for kind in ("keys", "shares"):
        assert sum.collecting == kind
        for name, body in zip(NAMES, bodies, strict=True):
            sum.take(name, Mask(request=1, round=0, body=body), [])
        told = sum.close(NAMES)
        if kind == "keys":
            bodies = [client.share_keys(told[name]) for client, name in zip(clients, NAMES, strict=True)]
    assert sum.collecting == "input"
    for client, name in zip(clients, NAMES, strict=True):
        body, words = client.mask_input(told[name], np.ones(3, np.float32), 1)
        sum.take(name, Mask(request=1, round=0, body=body), [words.data])
    sum.close(NAMES)
    assert sum.collecting == "unmask"
