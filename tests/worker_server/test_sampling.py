"""Which clients a round takes: the draw, and the rounds that wait for those who were drawn."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from shared.job import parse_job
from worker_server.greedy import Greedy
from worker_server.lockstep import Lockstep
from worker_server.plain_fedavg import PlainFedavg
from worker_server.replicas import Place
from worker_server.rounds import Plan, Rounds
from worker_server.sampling import drawn
from worker_server.server import make_rounds
from worker_server.work import Aggregate, Dismiss, Finish, Instruction, StartRound, Ticket

NAMES = ("anna", "berta", "clara", "dora", "emma")
SEED = 5
Machine = Callable[[Plan, int, Iterable[str]], Rounds]
MACHINES: dict[str, Machine] = {"lockstep": Lockstep, "greedy": Greedy, "plain_fedavg": PlainFedavg}


def ticket(name: str, request: int = 1, **fields: Any) -> Ticket:
    payload = fields.pop("payload", None)
    return Ticket(name.encode(), name, request, payload, **fields)


def plan(quorum: int = 2, **settings: Any) -> Plan:
    values: dict[str, Any] = {"clients": 5, "rounds": 6, "local_steps": 1, "deadline_s": 10, "sampled": 2, "seed": SEED}
    return Plan(**values | {"quorum": quorum, **settings})


@pytest.fixture(params=MACHINES)
def kind(request: pytest.FixtureRequest) -> Machine:
    return MACHINES[request.param]


def begin(
    kind: Machine, its_plan: Plan, round: int = 0, known: Iterable[str] = (), names: Iterable[str] = NAMES
) -> Any:
    """The machine, with all these clients, and what their joining brought."""
    rounds = kind(its_plan, round, known)
    return rounds, [instruction for name in names for instruction in rounds.joined(ticket(name), 0)]


def members(rounds: Rounds) -> list[str]:
    return sorted(rounds.active.values())


def expected(round: int, names: Iterable[str] = NAMES) -> list[str]:
    return sorted(drawn(names, 2, SEED, round))


def train(rounds: Rounds) -> list[Instruction]:
    """The members' only step, and their updates; what the last of them brings."""
    here = members(rounds)
    if not isinstance(rounds, PlainFedavg):
        for name in here:
            rounds.forward(ticket(name, 5), rounds.round, 0, 0, 0)
        finish_works(rounds)
        for name in here:
            rounds.backward(ticket(name, 6, forward=5), 0)
        finish_works(rounds)
    return [
        instruction
        for name in here
        for instruction in rounds.update(ticket(name, 7, payload=b"update"), rounds.round, 0)
    ]


def finish_works(rounds: Rounds) -> None:
    """All that can run runs: greedy takes what there is one by one."""
    assert isinstance(rounds, Lockstep | Greedy)
    while rounds.works:
        if isinstance(rounds, Greedy):
            forwards = [c.number for c in rounds.cohorts.values() if not c.computed]
            if rounds.backwards:
                rounds.backward_done(next(iter(rounds.backwards)), 0)
            else:
                rounds.forward_done(forwards[0], 0)
            continue
        (cohort,) = rounds.cohorts
        (rounds.backward_done if cohort.stage == "backwarding" else rounds.forward_done)(cohort.number, 0)


def test_a_draw_is_a_function_of_seed_round_and_names_alone() -> None:
    assert drawn(NAMES, 2, 0, 0) == drawn(reversed(NAMES), 2, 0, 0) == ["emma", "clara"]
    assert [drawn(NAMES, 2, 0, round) for round in (1, 2)] == [["berta", "clara"], ["berta", "emma"]]
    assert drawn(NAMES, 2, 1, 1) == ["clara", "berta"]
    assert sorted(drawn(NAMES, 9, 0, 0)) == sorted(NAMES)


def test_all_are_drawn_alike_often_and_pairs_too() -> None:
    """4,000 rounds of two of five: 1,600 each (standard deviation 31), and 400 for each of ten pairs (19)."""
    pairs = Counter(tuple(sorted(drawn(NAMES, 2, 0, round))) for round in range(4000))
    each = Counter(name for pair, count in pairs.items() for name in pair for _ in range(count))
    assert len(pairs) == 10
    assert all(abs(count - 1600) < 5 * 31 for count in each.values())
    assert all(abs(count - 400) < 5 * 19 for count in pairs.values())


def test_one_more_client_changes_one_place_at_most() -> None:
    for round in range(200):
        before, after = (set(drawn(names, 3, 0, round)) for names in (NAMES, (*NAMES, "fanny")))
        assert len(before - after) <= 1
        assert after - before <= {"fanny"}


def test_a_round_takes_the_drawn_and_says_nothing_to_the_others(kind: Machine) -> None:
    rounds, came = begin(kind, plan())
    (start,) = came
    assert isinstance(start, StartRound)
    assert [t.client for t in start.answers] == expected(0)
    assert {t.client for t in rounds.lobby.values()} == {*NAMES} - {*expected(0)}


def test_round_for_round_others_are_drawn_and_at_the_end_all_are_told(kind: Machine) -> None:
    rounds, _ = begin(kind, plan())
    for number in range(6):
        assert members(rounds) == expected(number)
        (aggregate,) = train(rounds)
        assert isinstance(aggregate, Aggregate)
        assert [t.client for t in aggregate.updates] == expected(number)
        assert aggregate.clients == NAMES
        (after,) = rounds.aggregation_done()
        if number < 5:
            assert isinstance(after, StartRound)
            assert all(t.payload is None for t in rounds.lobby.values())
    assert isinstance(after, Finish)
    assert {t.client for t in after.answers} == {*NAMES}
    assert rounds.last_members == {*NAMES}


def test_an_undone_round_waits_for_those_it_drew_whoever_else_is_there(kind: Machine) -> None:
    rounds, _ = begin(kind, plan())
    first, second = expected(0)
    came = rounds.left(second.encode(), 0)
    assert came == [Dismiss((first.encode(),))]
    rounds.left(first.encode(), 0)
    assert (rounds.stage, rounds.missing, len(rounds.lobby)) == ("waiting", 2, 3)
    assert rounds.awaited == [first, second]
    assert rounds.joined(ticket(first), 0) == []
    assert (rounds.missing, rounds.awaited) == (1, [second])
    (start,) = rounds.joined(ticket(second), 0)
    assert isinstance(start, StartRound)
    assert members(rounds) == expected(0)
    assert (rounds.missing, rounds.awaited) == (0, [])


def test_who_comes_new_is_drawn_from_the_next_round_on_even_if_this_one_is_undone(kind: Machine) -> None:
    strangers = ((*NAMES, f"fanny{number}") for number in range(200))
    names = next(  # one who would be drawn at once, and is for the round after
        names for names in strangers if names[-1] in expected(0, names) and names[-1] in expected(1, names)
    )
    rounds, _ = begin(kind, plan())
    rounds.joined(ticket(names[-1]), 0)
    for name in expected(0):
        rounds.left(name.encode(), 0)
    for name in expected(0):
        rounds.joined(ticket(name), 0)
    assert members(rounds) == expected(0)
    (aggregate,) = train(rounds)
    assert isinstance(aggregate, Aggregate)
    assert aggregate.clients == tuple(sorted(names))
    rounds.aggregation_done()
    assert members(rounds) == expected(1, names)


def test_a_resumed_server_draws_from_the_clients_it_knew(kind: Machine) -> None:
    rounds, came = begin(kind, plan(), 3, NAMES, names=["zoe", "yvonne", *(set(NAMES) - set(expected(3)))])
    assert came == []
    assert rounds.missing == 2
    for name in expected(3):
        rounds.joined(ticket(name), 0)
    assert members(rounds) == expected(3)


def test_with_a_smaller_quorum_the_draw_passes_over_who_is_not_there(kind: Machine) -> None:
    rounds, _ = begin(kind, plan(quorum=1))
    gone, stays = expected(0)
    rounds.left(gone.encode(), 0)
    assert members(rounds) == [stays]
    train(rounds)
    rounds.aggregation_done()
    assert members(rounds) == expected(1, set(NAMES) - {gone})


def test_who_is_admitted_no_more_is_waited_for_no_more(kind: Machine) -> None:
    rounds, _ = begin(kind, plan())
    gone, stays = expected(0)
    rounds.left(gone.encode(), 0)
    rounds.left(stays.encode(), 0)
    rounds.joined(ticket(stays), 0)
    assert rounds.only(frozenset(NAMES)) == []
    (start,) = rounds.only(frozenset(NAMES) - {gone})
    assert isinstance(start, StartRound)
    assert members(rounds) == expected(0, set(NAMES) - {gone})


def test_with_too_few_left_of_those_it_knew_a_round_takes_new_ones(kind: Machine) -> None:
    rounds, _ = begin(kind, plan(clients=2), names=NAMES[:2])
    rounds.left(b"anna", 0)
    rounds.left(b"berta", 0)
    rounds.joined(ticket("berta"), 0)
    rounds.only(frozenset({"berta", "zoe"}))
    assert rounds.missing == 1
    rounds.joined(ticket("zoe"), 0)
    assert members(rounds) == ["berta", "zoe"]


def test_the_jobs_settings_reach_the_machine() -> None:
    job = parse_job(
        {
            "model_name_or_path": "m",
            "training": {"seed": 9},
            "cohort": {"clients": 5, "sampled": 3, "quorum": 2, "deadline_mads": 4},
            "aggregation": {"secure": "off"},
        },
        "job",
    )
    rounds = make_rounds(job, 2, known=("anna",))
    its = rounds.plan
    assert (its.clients, its.sampled, its.quorum, its.seed, its.deadline_mads) == (5, 3, 2, 9, 4)
    assert rounds.known == {"anna"}


def test_a_world_of_one_is_a_server_on_its_own() -> None:
    """As torchrun makes it."""
    job = parse_job({"model_name_or_path": "m", "cohort": {"clients": 6, "sampled": 3}}, "job")
    alone = Place(replica=0, replicas=1, host="localhost", port=1, hosts_store=True)
    assert make_rounds(job, 0, alone).plan.quorum == make_rounds(job, 0).plan.quorum == 3
