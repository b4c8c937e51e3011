"""The greedy state machine, without I/O: what the trunk takes when it is free."""

from typing import Any

import pytest

from worker_server.greedy import Greedy
from worker_server.rounds import Plan
from worker_server.work import Aggregate, Instruction, Refuse, Restore, RunBackward, RunForward, StartRound, Ticket

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16
NAMES = {A: "anna", B: "berta", C: "clara"}


def ticket(session: bytes, request: int = 1, **fields: Any) -> Ticket:
    return Ticket(session, NAMES[session], request, None, **fields)


def started(sessions: list[bytes], **settings: Any) -> Greedy:
    plan = Plan(
        **{"clients": len(sessions), "rounds": 2, "local_steps": 2, "deadline_s": 10, "in_flight": 2} | settings
    )
    greedy = Greedy(plan)
    for session in sessions:
        greedy.joined(ticket(session), 0)
    return greedy


def backward(greedy: Greedy, session: bytes, forward: int, now: float = 0) -> list[Instruction]:
    return greedy.backward(ticket(session, 100 + forward, forward=forward), now)


def test_an_idle_trunk_takes_the_first_request_at_once() -> None:
    greedy = started([A, B])
    assert greedy.forward(ticket(A), 0, 0, 0, 0) == [RunForward(0, (ticket(A),))]


def test_a_busy_trunk_takes_all_that_waits_when_it_is_free_one_request_of_each() -> None:
    greedy = started([A, B, C])
    greedy.forward(ticket(C, 1), 0, 0, 0, 0)
    assert greedy.forward(ticket(B, 1), 0, 0, 0, 0) == []
    assert greedy.forward(ticket(A, 1), 0, 0, 0, 0) == []
    assert greedy.forward(ticket(A, 2), 0, 1, 0, 0) == []
    assert greedy.forward_done(0, 0) == [RunForward(1, (ticket(A, 1), ticket(B, 1)))]
    assert greedy.forward_done(1, 0) == [RunForward(2, (ticket(A, 2),))]


def test_the_budget_goes_to_who_was_served_least() -> None:
    greedy = started([A, B, C], max_batch_tokens=100, in_flight=2)
    greedy.forward(ticket(A, 1, tokens=60), 0, 0, 0, 0)
    greedy.forward(ticket(A, 2, tokens=60), 0, 1, 0, 0)
    greedy.forward(ticket(C, 1, tokens=60), 0, 0, 0, 0)
    greedy.forward(ticket(B, 1, tokens=30), 0, 0, 0, 0)
    # Anna was served once already, though she asks again before the others.
    assert greedy.forward_done(0, 0) == [RunForward(1, (ticket(B, 1, tokens=30), ticket(C, 1, tokens=60)))]


def test_gradients_come_before_forwards_and_a_backward_is_a_step_of_its_share() -> None:
    greedy = started([A, B])
    greedy.forward(ticket(A, 1), 0, 0, 0, 0)
    greedy.forward_done(0, 0)
    greedy.forward(ticket(B, 1), 0, 0, 0, 0)
    assert backward(greedy, A, 1) == []  # the trunk is busy with Berta's
    greedy.forward(ticket(A, 2), 0, 1, 0, 0)
    (work,) = greedy.forward_done(1, 0)
    assert work == RunBackward(0, (ticket(A, 1),), {A: ticket(A, 101, forward=1)}, steps=0.5, last=True)


def both_forwarded(**settings: Any) -> Greedy:
    """Clara's request ran alone, Anna's and Berta's after it together."""
    greedy = started([A, B, C], **settings)
    greedy.forward(ticket(C, 1), 0, 0, 0, 0)
    greedy.forward(ticket(A, 1), 0, 0, 0, 0)
    greedy.forward(ticket(B, 1), 0, 0, 0, 0)
    greedy.forward_done(0, 0)
    greedy.forward_done(1, 0)
    return greedy


def test_a_backward_waits_for_the_last_gradient_with_patience_and_then_goes_without() -> None:
    greedy = both_forwarded(patience_s=2)
    assert backward(greedy, A, 1, now=5) == []
    assert greedy.deadline() == 7
    assert greedy.tick(6.9) == []
    (early,) = greedy.tick(7)
    assert isinstance(early, RunBackward)
    assert (early.cohort, list(early.gradients), early.last) == (1, [A], False)
    assert greedy.backward_done(1, 8) == []
    (late,) = backward(greedy, B, 1, now=9)
    assert isinstance(late, RunBackward)
    assert (late.cohort, list(late.gradients), late.last) == (1, [B], True)


def test_who_leaves_is_not_waited_for_and_what_he_leaves_is_let_go() -> None:
    greedy = both_forwarded()
    backward(greedy, A, 1)
    (work,) = greedy.left(B, 0)
    assert isinstance(work, RunBackward)
    assert (list(work.gradients), work.last) == ([A], True)
    greedy.backward_done(1, 0)
    (work,) = greedy.left(C, 0)
    assert work == RunBackward(0, (ticket(C, 1),), {}, steps=None, last=True)


def step(greedy: Greedy, session: bytes, request: int, number: int, now: float = 0) -> None:
    (work,) = greedy.forward(ticket(session, request), greedy.round, number, 0, now)
    assert isinstance(work, RunForward)
    greedy.forward_done(work.cohort, now)
    (back,) = backward(greedy, session, request, now)
    assert isinstance(back, RunBackward)
    greedy.backward_done(back.cohort, now)


def test_everybody_has_their_own_pace_until_the_round_ends() -> None:
    greedy = started([A, B])
    step(greedy, A, 1, 0)
    step(greedy, A, 2, 1)
    assert greedy.update(ticket(A, 9), 0, 0) == []
    step(greedy, B, 1, 0)
    assert isinstance(greedy.update(ticket(B, 9), 0, 0)[0], Refuse)  # one step is missing
    step(greedy, B, 2, 1)
    assert greedy.update(ticket(B, 9), 0, 0) == [Aggregate(0, (ticket(A, 9), ticket(B, 9)))]
    assert greedy.aggregation_done() == [StartRound(1, (ticket(A, 9), ticket(B, 9)))]


def test_a_member_that_goes_on_is_not_late_and_one_from_whom_nothing_comes_is() -> None:
    greedy = started([A, B])
    step(greedy, A, 1, 0)
    step(greedy, A, 2, 1)
    greedy.update(ticket(A, 9), 0, 100)
    assert greedy.deadline() == 110
    step(greedy, B, 1, 0, now=105)
    assert greedy.tick(110) == []
    assert greedy.deadline() == 115
    assert greedy.tick(115) == [Aggregate(0, (ticket(A, 9),))]


def test_a_round_without_members_is_undone_after_the_work_under_way() -> None:
    greedy = started([A])
    greedy.forward(ticket(A, 1), 0, 0, 0, 0)
    assert greedy.left(A, 0) == []
    greedy.joined(ticket(B), 0)
    assert greedy.forward_done(0, 0) == [Restore(0), StartRound(0, (ticket(B),))]
    assert greedy.left(B, 0) == []  # nothing ran: nothing to undo


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (lambda m: m.forward(Ticket(b"d" * 16, "dora", 1, None), 0, 0, 0, 0), "not_in_round"),
        (lambda m: m.forward(ticket(B), 1, 0, 0, 0), "wrong_step"),
        (lambda m: m.forward(ticket(B), 0, 1, 0, 0), "wrong_step"),
        (lambda m: m.forward(ticket(B), 0, 0, 1, 0), "wrong_step"),
        (lambda m: m.forward(ticket(A, 7), 0, 1, 0, 0), "too_many_in_flight"),
        (lambda m: m.backward(ticket(B, 7, forward=1), 0), "wrong_step"),
        (lambda m: m.backward(ticket(A, 7, forward=2), 0), "wrong_step"),
        (lambda m: m.backward(ticket(A, 7, forward=1, tokens=3), 0), "tensor"),
        (lambda m: m.update(ticket(A, 7), 0, 0), "wrong_step"),
    ],
)
def test_what_does_not_fit_is_refused(event: Any, code: str) -> None:
    greedy = started([A, B], in_flight=1)
    greedy.forward(ticket(A, 1), 0, 0, 0, 0)
    greedy.forward_done(0, 0)
    (refusal,) = event(greedy)
    assert isinstance(refusal, Refuse)
    assert refusal.code == code


def test_a_gradient_that_came_already_is_refused() -> None:
    greedy = both_forwarded()
    backward(greedy, A, 1)
    (refusal,) = backward(greedy, A, 1)
    assert isinstance(refusal, Refuse)
    assert refusal.code == "repeated"
