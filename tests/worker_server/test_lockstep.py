"""The lockstep state machine, without I/O: its rules and its refusals."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

import pytest

from shared.job import parse_job
from worker_server.lockstep import Lockstep
from worker_server.replicas import Place
from worker_server.rounds import Plan
from worker_server.server import make_rounds
from worker_server.work import (
    Aggregate,
    Dismiss,
    Finish,
    Instruction,
    Refuse,
    Restore,
    RunBackward,
    RunForward,
    StartRound,
    Ticket,
)

Stage = Literal["waiting", "forward", "forwarding", "backward", "backwarding", "updating", "aggregating", "finished"]

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16
NAMES = {A: "anna", B: "berta", C: "clara"}


def ticket(session: bytes, request: int = 1, **fields: Any) -> Ticket:
    return Ticket(session, NAMES[session], request, None, **fields)


def machine(clients: int = 2, rounds: int = 2, local_steps: int = 2) -> Lockstep:
    return Lockstep(Plan(clients=clients, rounds=rounds, local_steps=local_steps, deadline_s=10))


def stage_of(lockstep: Lockstep) -> Stage:
    """The stage of the step's only cohort, where there is a step."""
    if lockstep.stage == "training":
        stage = lockstep.cohorts[0].stage if lockstep.cohorts else "updating"
        assert stage != "done"
        return stage
    assert lockstep.stage != "undoing"
    return lockstep.stage


def number(lockstep: Lockstep) -> int:
    """Of the step's only cohort."""
    return lockstep.cohorts[0].number


def started(clients: int = 2, **settings: int) -> Lockstep:
    lockstep = machine(clients, **settings)
    for session in [A, B, C][:clients]:
        lockstep.joined(ticket(session), 0)
    return lockstep


def step(lockstep: Lockstep, sessions: list[bytes]) -> list[Instruction]:
    """All of a step's requests; what its end brings."""
    round_, step_ = lockstep.round, lockstep.step
    for session in sessions:
        lockstep.forward(ticket(session, 5), round_, step_, 0, 0)
    lockstep.forward_done(number(lockstep), 0)
    for session in sessions:
        lockstep.backward(ticket(session, 6, forward=5), 0)
    return lockstep.backward_done(number(lockstep), 0)


def snapshot(lockstep: Lockstep) -> dict[str, Any]:
    return {name: value.copy() if isinstance(value, dict | list) else value for name, value in vars(lockstep).items()}


def test_a_round_begins_when_enough_clients_are_there() -> None:
    lockstep = machine()
    assert lockstep.joined(ticket(B), 0) == []
    assert lockstep.joined(ticket(A), 0) == [StartRound(0, (ticket(A), ticket(B)))]


def test_the_cohort_has_the_order_of_names_whoever_was_first() -> None:
    lockstep = started()
    assert lockstep.forward(ticket(B, 7), 0, 0, 0, 0) == []
    assert lockstep.forward(ticket(A, 9), 0, 0, 0, 1) == [RunForward(0, (ticket(A, 9), ticket(B, 7)))]


def test_a_step_is_one_forward_and_one_backward_for_all() -> None:
    lockstep = started()
    lockstep.forward(ticket(A, 5), 0, 0, 0, 0)
    lockstep.forward(ticket(B, 5), 0, 0, 0, 0)
    assert lockstep.forward_done(number(lockstep), 0) == []
    assert lockstep.backward(ticket(A, 6, forward=5), 0) == []
    work = lockstep.backward(ticket(B, 6, forward=5), 0)
    assert work == [
        RunBackward(0, (ticket(A, 5), ticket(B, 5)), {A: ticket(A, 6, forward=5), B: ticket(B, 6, forward=5)})
    ]
    assert lockstep.backward_done(number(lockstep), 0) == []
    assert (lockstep.round, lockstep.step) == (0, 1)


def test_after_the_last_step_come_updates_and_the_next_round() -> None:
    lockstep = started()
    step(lockstep, [A, B])
    step(lockstep, [A, B])
    assert stage_of(lockstep) == "updating"
    lockstep.update(ticket(B, 8, weight=3), 0, 0)
    assert lockstep.update(ticket(A, 8, weight=1), 0, 0) == [
        Aggregate(0, (ticket(A, 8, weight=1), ticket(B, 8, weight=3)))
    ]
    assert lockstep.aggregation_done() == [StartRound(1, (ticket(A, 8, weight=1), ticket(B, 8, weight=3)))]


def test_after_the_last_round_all_are_told() -> None:
    lockstep = started(rounds=1, local_steps=1)
    step(lockstep, [A, B])
    lockstep.joined(ticket(C), 0)
    lockstep.update(ticket(A, 8), 0, 0)
    lockstep.update(ticket(B, 8), 0, 0)
    assert lockstep.aggregation_done() == [Finish((ticket(A, 8), ticket(B, 8), ticket(C)))]
    lockstep.left(C, 0)
    assert lockstep.joined(ticket(C), 0) == [Finish((ticket(C),))]


def test_who_comes_late_waits_for_the_next_round() -> None:
    lockstep = started(local_steps=1)
    assert lockstep.joined(ticket(C), 0) == []
    step(lockstep, [A, B])
    lockstep.update(ticket(A, 8), 0, 0)
    lockstep.update(ticket(B, 8), 0, 0)
    assert lockstep.aggregation_done() == [StartRound(1, (ticket(A, 8), ticket(B, 8), ticket(C)))]


@pytest.mark.parametrize("stage", ["forward", "forwarding", "backward", "backwarding", "updating", "aggregating"])
def test_whoever_leaves_does_not_stall_the_rest(stage: str) -> None:
    lockstep = started(local_steps=1)
    advance(lockstep, stage)
    work = lockstep.left(B, 0)
    if stage == "forward":
        assert work == [RunForward(0, (ticket(A, 5),))]
    elif stage == "backward":
        assert work == [RunBackward(0, (ticket(A, 5), ticket(B, 5)), {A: ticket(A, 6, forward=5)})]
    elif stage == "updating":
        assert work == [Aggregate(0, (ticket(A, 8),))]
    else:
        assert work == []
    assert list(lockstep.active) == [A]


def at(stage: Stage) -> Lockstep:
    """At `stage`, with A's request there and B's missing where requests are collected; C is nowhere."""
    if stage == "waiting":
        lockstep = machine()
        lockstep.joined(ticket(A), 0)
        return lockstep
    lockstep = started(rounds=1, local_steps=1)
    advance(lockstep, "aggregating" if stage == "finished" else stage)
    if stage == "finished":
        lockstep.aggregation_done()
    assert stage_of(lockstep) == stage
    return lockstep


def advance(lockstep: Lockstep, stage: str) -> None:
    lockstep.forward(ticket(A, 5), 0, 0, 0, 0)
    if stage == "forward":
        return
    lockstep.forward(ticket(B, 5), 0, 0, 0, 0)
    if stage == "forwarding":
        return
    lockstep.forward_done(number(lockstep), 0)
    lockstep.backward(ticket(A, 6, forward=5), 0)
    if stage == "backward":
        return
    lockstep.backward(ticket(B, 6, forward=5), 0)
    if stage == "backwarding":
        return
    lockstep.backward_done(number(lockstep), 0)
    lockstep.update(ticket(A, 8), 0, 0)
    if stage == "updating":
        return
    lockstep.update(ticket(B, 8), 0, 0)
    assert stage_of(lockstep) == stage


def test_a_round_without_members_is_undone_and_begun_anew() -> None:
    lockstep = started()
    step(lockstep, [A, B])
    assert lockstep.left(A, 0) == []
    lockstep.joined(ticket(C), 0)
    assert lockstep.left(B, 0) == [Restore(0), StartRound(0, (ticket(C),))]
    assert lockstep.step == 0


def test_a_round_in_which_nothing_ran_needs_no_undoing() -> None:
    lockstep = started()
    lockstep.forward(ticket(A, 5), 0, 0, 0, 0)
    lockstep.joined(ticket(C), 0)
    assert lockstep.left(A, 0) == []
    assert lockstep.left(B, 0) == [StartRound(0, (ticket(C),))]
    assert lockstep.left(C, 0) == []
    assert lockstep.stage == "waiting"


def test_who_misses_the_deadline_is_left_behind() -> None:
    lockstep = started()
    assert lockstep.deadline() is None
    lockstep.forward(ticket(A, 5), 0, 0, 0, 100)
    assert lockstep.deadline() == 110
    assert lockstep.tick(109) == []
    assert lockstep.tick(110) == [RunForward(0, (ticket(A, 5),))]
    assert isinstance(lockstep.forward(ticket(B, 5), 0, 0, 0, 111)[0], Refuse)


def test_a_resumed_job_goes_on_at_its_round_and_waits_for_all_clients() -> None:
    lockstep = Lockstep(Plan(clients=2, rounds=5, local_steps=1, deadline_s=1), round=3)
    assert lockstep.joined(ticket(A), 0) == []
    assert lockstep.joined(ticket(B), 0) == [StartRound(3, (ticket(A), ticket(B)))]


def test_who_does_not_come_back_to_a_resumed_job_is_waited_for_as_the_quorum_says() -> None:
    def resumed(**settings: Any) -> Lockstep:
        return Lockstep(
            Plan(clients=3, rounds=5, local_steps=1, deadline_s=1, **settings), round=3, known=NAMES.values()
        )

    all_needed, two_needed, drawn = resumed(quorum=3), resumed(quorum=2), resumed(quorum=1, sampled=1, seed=0)
    for lockstep in (all_needed, two_needed, drawn):
        assert lockstep.joined(ticket(A), 0) == []
        assert lockstep.missing == 2
    assert two_needed.wait_no_longer() == []
    assert two_needed.missing == 1
    assert two_needed.joined(ticket(B), 2) == [StartRound(3, (ticket(A), ticket(B)))]
    assert all_needed.wait_no_longer() == []
    assert all_needed.joined(ticket(B), 2) == []
    assert all_needed.missing == 1
    begun = [*drawn.wait_no_longer(), *drawn.joined(ticket(B), 2), *drawn.joined(ticket(C), 2)]
    assert [type(each) for each in begun] == [StartRound]


def test_a_new_job_begins_with_all_its_clients_however_long_that_takes() -> None:
    lockstep = Lockstep(Plan(clients=2, rounds=5, local_steps=1, deadline_s=1))
    assert lockstep.joined(ticket(A), 0) == []
    assert lockstep.wait_no_longer() == []
    assert lockstep.missing == 1


def test_a_round_that_loses_more_than_the_quorum_allows_is_undone_and_waits_for_who_is_missing() -> None:
    lockstep = Lockstep(Plan(clients=3, rounds=5, local_steps=2, deadline_s=10, quorum=2))
    for session in (A, B, C):
        lockstep.joined(ticket(session), 0)
    step(lockstep, [A, B, C])
    lockstep.left(C, 0)
    assert (lockstep.stage, set(lockstep.active)) == ("training", {A, B})
    assert lockstep.left(B, 0) == [Dismiss((A,)), Restore(0)]
    assert (lockstep.stage, lockstep.missing) == ("waiting", 2)
    assert lockstep.joined(ticket(A), 0) == []
    assert lockstep.missing == 1
    assert lockstep.joined(ticket(C), 0) == [StartRound(0, (ticket(A), ticket(C)))]
    assert lockstep.missing == 0


def test_a_replica_does_not_end_a_round_without_clients_that_the_quorum_needs() -> None:
    plan = Plan(clients=1, rounds=5, local_steps=2, deadline_s=10, replicated=True)
    assert Lockstep(replace(plan, never_idle=True)).ended_elsewhere() == []
    assert Lockstep(plan).ended_elsewhere() == [Aggregate(0, ())]


@pytest.mark.parametrize(
    ("cohort", "replica", "quorum", "never_idle"),
    [
        ({"clients": 3}, 0, 2, True),  # all are needed, also those of each server
        ({"clients": 3}, 1, 1, True),
        ({"clients": 3, "quorum": 2}, 0, 1, False),
        ({"clients": 3, "quorum": 2}, 1, 1, False),  # its one client may be lost
        ({"clients": 1}, 1, 1, False),  # it has none
    ],
)
def test_a_replicas_quorum_is_of_its_share_of_the_clients(
    cohort: dict[str, int], replica: int, quorum: int, never_idle: bool
) -> None:
    job = parse_job({"model_name_or_path": "m", "cohort": cohort, "aggregation": {"secure": "off"}}, "job")
    plan = make_rounds(job, 0, Place(replica, 2, "localhost", 1, hosts_store=False)).plan
    assert (plan.quorum, plan.never_idle, plan.replicated) == (quorum, never_idle, True)


def test_a_replica_begins_when_all_have_their_clients() -> None:
    lockstep = Lockstep(Plan(clients=2, rounds=5, local_steps=1, deadline_s=1, replicated=True))
    lockstep.joined(ticket(A), 0)
    had = lockstep.has_its_clients
    assert lockstep.joined(ticket(B), 0) == []
    assert (had, lockstep.has_its_clients) == (False, True)
    assert lockstep.all_have_their_clients() == [StartRound(0, (ticket(A), ticket(B)))]
    assert lockstep.all_have_their_clients() == []
    lockstep.left(A, 0)
    lockstep.left(B, 0)
    assert lockstep.joined(ticket(C), 0) == [StartRound(0, (ticket(C),))]  # begun once, it waits no more


def test_a_round_that_ends_at_another_replica_is_joined_by_one_that_has_no_members() -> None:
    lockstep = machine()
    assert lockstep.ended_elsewhere() == [Aggregate(0, ())]
    lockstep.joined(ticket(A), 0)
    assert lockstep.joined(ticket(B), 0) == []
    assert lockstep.ended_elsewhere() == []  # once
    assert lockstep.aggregation_done() == [StartRound(1, (ticket(A), ticket(B)))]
    assert lockstep.ended_elsewhere() == []  # its members will end it


EVENTS: dict[str, Callable[[Lockstep], list[Instruction]]] = {
    "join": lambda m: m.joined(ticket(B), 0),
    "forward": lambda m: m.forward(ticket(B, 5), 0, 0, 0, 0),
    "backward": lambda m: m.backward(ticket(B, 6, forward=5), 0),
    "update": lambda m: m.update(ticket(B, 8), 0, 0),
}
STAGES: tuple[Stage, ...] = get_args(Stage)
FITS: set[tuple[Stage, str]] = {
    ("waiting", "join"),
    ("forward", "forward"),
    ("backward", "backward"),
    ("updating", "update"),
    ("finished", "join"),
}


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_takes_its_own_events_and_refuses_the_rest_unchanged(stage: Stage, event: str) -> None:
    lockstep = at(stage)
    before = snapshot(lockstep)
    instructions = EVENTS[event](lockstep)
    if (stage, event) in FITS:
        assert instructions
        assert not any(isinstance(instruction, Refuse) for instruction in instructions)
        return
    (refusal,) = instructions
    assert isinstance(refusal, Refuse)
    member = stage not in ("waiting", "finished")
    expected = {"join": "joined_already", "forward": "wrong_step" if member else "not_in_round"}
    assert refusal.code == expected.get(event, "wrong_step")
    assert (refusal.session, refusal.request) == (B, {"join": 1, "forward": 5, "backward": 6, "update": 8}[event])
    assert snapshot(lockstep) == before


@pytest.mark.parametrize("stage", STAGES)
def test_at_any_stage_a_stranger_may_leave(stage: Stage) -> None:
    lockstep = at(stage)
    before = snapshot(lockstep)
    assert lockstep.left(C, 0) == []
    assert snapshot(lockstep) == before


@pytest.mark.parametrize("stage", ["backward", "updating"])
def test_every_collecting_stage_has_its_deadline(stage: Stage) -> None:
    lockstep = at(stage)
    assert lockstep.deadline() == 10
    assert lockstep.tick(9) == []
    (work,) = lockstep.tick(10)
    assert isinstance(work, RunBackward if stage == "backward" else Aggregate)
    assert list(lockstep.active) == [A]


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (lambda m: m.joined(ticket(A), 0), "joined_already"),
        (lambda m: m.joined(Ticket(C, "anna", 1, None), 0), "name_in_use"),
        (lambda m: m.forward(ticket(C), 0, 0, 0, 0), "not_in_round"),
        (lambda m: m.forward(ticket(B), 0, 1, 0, 0), "wrong_step"),
        (lambda m: m.forward(ticket(B), 1, 0, 0, 0), "wrong_step"),
        (lambda m: m.forward(ticket(A), 0, 0, 0, 0), "repeated"),
        (lambda m: m.backward(ticket(A, forward=5), 0), "wrong_step"),
        (lambda m: m.update(ticket(A), 0, 0), "wrong_step"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(event: Any, code: str) -> None:
    lockstep = started()
    advance(lockstep, "forward")
    before = snapshot(lockstep)
    (refusal,) = event(lockstep)
    assert refusal.code == code
    assert snapshot(lockstep) == before


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (lambda m: m.backward(ticket(A, 7, forward=5), 0), "repeated"),
        (lambda m: m.backward(ticket(B, 7, forward=4), 0), "wrong_step"),
        (lambda m: m.backward(ticket(B, 7, forward=5, tokens=3), 0), "tensor"),
        (lambda m: m.forward(ticket(B), 0, 0, 0, 0), "wrong_step"),
    ],
)
def test_a_gradient_that_does_not_fit_is_refused(event: Any, code: str) -> None:
    lockstep = started()
    advance(lockstep, "backward")
    before = snapshot(lockstep)
    (refusal,) = event(lockstep)
    assert refusal.code == code
    assert snapshot(lockstep) == before


def in_flight(micro_batches: int, window: int) -> Lockstep:
    plan = Plan(clients=2, rounds=1, local_steps=1, deadline_s=10, micro_batches=micro_batches, in_flight=window)
    lockstep = Lockstep(plan)
    for session in [A, B]:
        lockstep.joined(ticket(session), 0)
    return lockstep


def test_micro_batches_of_a_step_are_under_way_together_and_run_in_order() -> None:
    lockstep = in_flight(2, 2)
    assert lockstep.forward(ticket(A, 1), 0, 0, 0, 0) == []
    assert lockstep.forward(ticket(A, 2), 0, 0, 1, 0) == []
    assert lockstep.forward(ticket(B, 2), 0, 0, 1, 0) == []  # whole, but the first comes first
    both = lockstep.forward(ticket(B, 1), 0, 0, 0, 0)
    assert both == [RunForward(0, (ticket(A, 1), ticket(B, 1))), RunForward(1, (ticket(A, 2), ticket(B, 2)))]
    assert lockstep.forward_done(0, 0) == []
    assert lockstep.forward_done(1, 0) == []
    for session in [A, B]:
        assert lockstep.backward(ticket(session, 4, forward=2), 0) == []
    assert lockstep.backward(ticket(A, 3, forward=1), 0) == []
    first, second = lockstep.backward(ticket(B, 3, forward=1), 0)
    assert isinstance(first, RunBackward)
    assert isinstance(second, RunBackward)
    # The optimizer steps after the last micro-batch alone.
    assert (first.cohort, first.steps, second.cohort, second.steps) == (0, None, 1, 1.0)
    lockstep.backward_done(0, 0)
    assert lockstep.step == 0
    lockstep.backward_done(1, 0)
    assert lockstep.step == 1


def test_more_under_way_than_the_job_allows_is_refused() -> None:
    lockstep = in_flight(3, 2)
    lockstep.forward(ticket(A, 1), 0, 0, 0, 0)
    lockstep.forward(ticket(A, 2), 0, 0, 1, 0)
    (refusal,) = lockstep.forward(ticket(A, 3), 0, 0, 2, 0)
    assert isinstance(refusal, Refuse)
    assert refusal.code == "too_many_in_flight"


def test_a_micro_batch_that_the_step_does_not_have_is_refused() -> None:
    (refusal,) = in_flight(2, 2).forward(ticket(A, 1), 0, 0, 2, 0)
    assert isinstance(refusal, Refuse)
    assert refusal.code == "wrong_step"


def test_a_whole_cohort_that_waits_its_turn_has_no_deadline() -> None:
    lockstep = in_flight(2, 2)
    lockstep.forward(ticket(A, 2), 0, 0, 1, 0)
    lockstep.forward(ticket(B, 2), 0, 0, 1, 0)
    assert lockstep.deadline() is None
    lockstep.forward(ticket(A, 1), 0, 0, 0, 3)
    assert lockstep.deadline() == 13


def test_a_member_whose_update_is_refused_has_done_its_part_and_stays() -> None:
    lockstep = started(local_steps=1)
    step(lockstep, [A, B])
    assert lockstep.update(ticket(A, refused="NaN"), 0, 0) == []
    good = ticket(B, weight=3)
    assert lockstep.update(good, 0, 0) == [Aggregate(0, (good,))]
    start = lockstep.aggregation_done()
    assert start == [StartRound(1, (ticket(A, refused="NaN"), good))]
    assert lockstep.last_members == {"anna", "berta"}


def test_a_round_whose_updates_are_all_refused_ends_without_any() -> None:
    lockstep = started(local_steps=1)
    step(lockstep, [A, B])
    lockstep.update(ticket(A, refused="NaN"), 0, 0)
    assert lockstep.update(ticket(B, refused="NaN"), 0, 0) == [Aggregate(0, ())]


def test_a_refused_update_is_not_made_up_for() -> None:
    lockstep = started(local_steps=1)
    step(lockstep, [A, B])
    lockstep.update(ticket(A, refused="NaN"), 0, 0)
    (second,) = lockstep.update(ticket(A, request=2), 0, 0)
    assert isinstance(second, Refuse)
    assert second.code == "repeated"
