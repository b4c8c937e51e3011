"""The lockstep state machine, without I/O: its rules, its refusals, and random histories."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker_server.lockstep import Lockstep, Stage
from worker_server.work import (
    Aggregate,
    Finish,
    Instruction,
    Refuse,
    Restore,
    RunBackward,
    RunForward,
    StartRound,
    Ticket,
    Work,
)

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16
NAMES = {A: "anna", B: "berta", C: "clara"}


def ticket(session: bytes, request: int = 1, **fields: Any) -> Ticket:
    return Ticket(session, NAMES[session], request, None, **fields)


def machine(clients: int = 2, rounds: int = 2, local_steps: int = 2) -> Lockstep:
    return Lockstep(clients=clients, rounds=rounds, local_steps=local_steps, deadline_s=10)


def started(clients: int = 2, **settings: int) -> Lockstep:
    lockstep = machine(clients, **settings)
    for session in [A, B, C][:clients]:
        lockstep.joined(ticket(session), 0)
    return lockstep


def step(lockstep: Lockstep, sessions: list[bytes]) -> list[Instruction]:
    """All of a step's requests; what its end brings."""
    round_, number = lockstep.round, lockstep.step
    for session in sessions:
        lockstep.forward(ticket(session, 5), round_, number, 0)
    lockstep.forward_done()
    for session in sessions:
        lockstep.backward(ticket(session, 6, forward=5), 0)
    return lockstep.backward_done()


def snapshot(lockstep: Lockstep) -> dict[str, Any]:
    return {name: value.copy() if isinstance(value, dict | list) else value for name, value in vars(lockstep).items()}


def test_a_round_begins_when_enough_clients_are_there() -> None:
    lockstep = machine()
    assert lockstep.joined(ticket(B), 0) == []
    assert lockstep.joined(ticket(A), 0) == [StartRound(0, (ticket(A), ticket(B)))]


def test_the_cohort_has_the_order_of_names_whoever_was_first() -> None:
    lockstep = started()
    assert lockstep.forward(ticket(B, 7), 0, 0, 0) == []
    assert lockstep.forward(ticket(A, 9), 0, 0, 1) == [RunForward((ticket(A, 9), ticket(B, 7)))]


def test_a_step_is_one_forward_and_one_backward_for_all() -> None:
    lockstep = started()
    lockstep.forward(ticket(A, 5), 0, 0, 0)
    lockstep.forward(ticket(B, 5), 0, 0, 0)
    assert lockstep.forward_done() == []
    assert lockstep.backward(ticket(A, 6, forward=5), 0) == []
    work = lockstep.backward(ticket(B, 6, forward=5), 0)
    assert work == [RunBackward((ticket(A, 5), ticket(B, 5)), {A: ticket(A, 6, forward=5), B: ticket(B, 6, forward=5)})]
    assert lockstep.backward_done() == []
    assert (lockstep.round, lockstep.step) == (0, 1)


def test_after_the_last_step_come_updates_and_the_next_round() -> None:
    lockstep = started()
    step(lockstep, [A, B])
    step(lockstep, [A, B])
    assert lockstep.stage == "updating"
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
        assert work == [RunForward((ticket(A, 5),))]
    elif stage == "backward":
        assert work == [RunBackward((ticket(A, 5), ticket(B, 5)), {A: ticket(A, 6, forward=5)})]
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
    assert lockstep.stage == stage
    return lockstep


def advance(lockstep: Lockstep, stage: str) -> None:
    lockstep.forward(ticket(A, 5), 0, 0, 0)
    if stage == "forward":
        return
    lockstep.forward(ticket(B, 5), 0, 0, 0)
    if stage == "forwarding":
        return
    lockstep.forward_done()
    lockstep.backward(ticket(A, 6, forward=5), 0)
    if stage == "backward":
        return
    lockstep.backward(ticket(B, 6, forward=5), 0)
    if stage == "backwarding":
        return
    lockstep.backward_done()
    lockstep.update(ticket(A, 8), 0, 0)
    if stage == "updating":
        return
    lockstep.update(ticket(B, 8), 0, 0)
    assert lockstep.stage == stage


def test_a_round_without_members_is_undone_and_begun_anew() -> None:
    lockstep = started()
    step(lockstep, [A, B])
    assert lockstep.left(A, 0) == []
    lockstep.joined(ticket(C), 0)
    assert lockstep.left(B, 0) == [Restore(0), StartRound(0, (ticket(C),))]
    assert lockstep.step == 0


def test_a_round_in_which_nothing_ran_needs_no_undoing() -> None:
    lockstep = started()
    lockstep.forward(ticket(A, 5), 0, 0, 0)
    lockstep.joined(ticket(C), 0)
    assert lockstep.left(A, 0) == []
    assert lockstep.left(B, 0) == [StartRound(0, (ticket(C),))]
    assert lockstep.left(C, 0) == []
    assert lockstep.stage == "waiting"


def test_who_misses_the_deadline_is_left_behind() -> None:
    lockstep = started()
    assert lockstep.deadline() is None
    lockstep.forward(ticket(A, 5), 0, 0, 100)
    assert lockstep.deadline() == 110
    assert lockstep.tick(109) == []
    assert lockstep.tick(110) == [RunForward((ticket(A, 5),))]
    assert isinstance(lockstep.forward(ticket(B, 5), 0, 0, 111)[0], Refuse)


def test_a_resumed_job_goes_on_at_its_round_and_waits_for_all_clients() -> None:
    lockstep = Lockstep(clients=2, rounds=5, local_steps=1, deadline_s=1, round=3)
    assert lockstep.joined(ticket(A), 0) == []
    assert lockstep.joined(ticket(B), 0) == [StartRound(3, (ticket(A), ticket(B)))]


EVENTS: dict[str, Callable[[Lockstep], list[Instruction]]] = {
    "join": lambda m: m.joined(ticket(B), 0),
    "forward": lambda m: m.forward(ticket(B, 5), 0, 0, 0),
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
        (lambda m: m.forward(ticket(C), 0, 0, 0), "not_in_round"),
        (lambda m: m.forward(ticket(B), 0, 1, 0), "wrong_step"),
        (lambda m: m.forward(ticket(B), 1, 0, 0), "wrong_step"),
        (lambda m: m.forward(ticket(A), 0, 0, 0), "repeated"),
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
        (lambda m: m.forward(ticket(B), 0, 0, 0), "wrong_step"),
    ],
)
def test_a_gradient_that_does_not_fit_is_refused(event: Any, code: str) -> None:
    lockstep = started()
    advance(lockstep, "backward")
    before = snapshot(lockstep)
    (refusal,) = event(lockstep)
    assert refusal.code == code
    assert snapshot(lockstep) == before


KINDS = ["join", "forward", "backward", "update"]


class Histories(RuleBasedStateMachine):
    """Any events in any order: never an exception, never two training works at once, cohorts of members only."""

    def __init__(self) -> None:
        super().__init__()
        self.lockstep = machine(clients=2, rounds=3, local_steps=2)
        self.queue: list[Work] = []
        self.now = 0.0

    def carry(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, RunForward | RunBackward | Aggregate | Restore):
                assert not any(isinstance(work, RunForward | RunBackward | Aggregate) for work in self.queue)
            if isinstance(instruction, RunForward):
                assert [t.session for t in instruction.tickets] == sorted(self.lockstep.active)
            if isinstance(instruction, RunBackward):
                assert instruction.gradients.keys() == self.lockstep.active.keys()
                assert instruction.gradients.keys() <= {t.session for t in instruction.forwards}
            if isinstance(instruction, Aggregate):
                assert [t.session for t in instruction.updates] == sorted(self.lockstep.active)
            if isinstance(instruction, Work):
                self.queue.append(instruction)

    @rule(session=st.sampled_from([A, B, C]), off=st.integers(0, 1), kind=st.sampled_from(KINDS))
    def one_request(self, session: bytes, off: int, kind: str) -> None:
        """Due or not."""
        lockstep, round_ = self.lockstep, self.lockstep.round
        match kind:
            case "join":
                self.carry(lockstep.joined(ticket(session), self.now))
            case "forward":
                self.carry(lockstep.forward(ticket(session, 5), round_, lockstep.step + off, self.now))
            case "backward":
                self.carry(lockstep.backward(ticket(session, 6, forward=5 - off), self.now))
            case "update":
                self.carry(lockstep.update(ticket(session, 8, weight=1), round_ + off, self.now))

    @rule(session=st.sampled_from([A, B, C]))
    def leave(self, session: bytes) -> None:
        self.carry(self.lockstep.left(session, self.now))

    @rule()
    def everyone_does_what_is_due(self) -> None:
        for session in [A, B, C]:
            if self.lockstep.stage == "waiting":
                self.carry(self.lockstep.joined(ticket(session), self.now))
        stage, round_ = self.lockstep.stage, self.lockstep.round
        for session in sorted(self.lockstep.active):
            if stage == "forward":
                self.carry(self.lockstep.forward(ticket(session, 5), round_, self.lockstep.step, self.now))
            elif stage == "backward":
                self.carry(self.lockstep.backward(ticket(session, 6, forward=5), self.now))
            elif stage == "updating":
                self.carry(self.lockstep.update(ticket(session, 8, weight=1), round_, self.now))

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.carry(self.lockstep.tick(self.now))

    @precondition(lambda self: self.queue)
    @rule()
    def computed(self) -> None:
        match self.queue.pop(0):
            case RunForward():
                self.carry(self.lockstep.forward_done())
            case RunBackward():
                self.carry(self.lockstep.backward_done())
            case Aggregate():
                self.carry(self.lockstep.aggregation_done())

    @invariant()
    def the_queue_of_works_is_short(self) -> None:
        assert len(self.queue) <= 3

    @invariant()
    def somebody_is_waited_for(self) -> None:
        """Never is a stage collected that nobody is missing from: it would not move."""
        if self.lockstep.stage in ("forward", "backward", "updating"):
            missing = self.lockstep.active.keys() - self.lockstep._collected().keys()
            assert missing


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
