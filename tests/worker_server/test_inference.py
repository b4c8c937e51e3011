"""Requests that train nothing: one cohort at a time, bounded, none lost."""

from typing import Any

from worker_server.inference import Inference
from worker_server.work import Refuse, ReleaseStreams, RunEvaluation, RunGeneration, Ticket

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16
NAMES = {A: "anna", B: "berta", C: "clara"}


def ticket(session: bytes, request: int = 1, **fields: Any) -> Ticket:
    return Ticket(session, NAMES[session], request, None, **fields)


def test_evaluations_are_answered_together_and_one_cohort_at_a_time() -> None:
    inference = Inference(100)
    assert inference.evaluate(ticket(B, 3)) == [RunEvaluation((ticket(B, 3),))]
    assert inference.evaluate(ticket(B, 5)) == []
    assert inference.evaluate(ticket(A, 4)) == []
    assert inference.done() == [RunEvaluation((ticket(A, 4), ticket(B, 5)))]
    assert inference.done() == []


def test_a_cohort_has_as_many_tokens_as_it_may_and_the_rest_comes_next() -> None:
    inference = Inference(100)
    inference.evaluate(ticket(C, 2, tokens=1))
    inference.evaluate(ticket(B, 3, tokens=60))
    inference.evaluate(ticket(A, 4, tokens=60))
    inference.evaluate(ticket(C, 5, tokens=10))
    assert inference.done() == [RunEvaluation((ticket(B, 3, tokens=60),))]
    assert inference.done() == [RunEvaluation((ticket(A, 4, tokens=60), ticket(C, 5, tokens=10)))]


def test_a_session_has_one_evaluation_waiting() -> None:
    inference = Inference(100)
    inference.evaluate(ticket(B, 3))
    inference.evaluate(ticket(A, 4))
    (refusal,) = inference.evaluate(ticket(A, 5))
    assert isinstance(refusal, Refuse)
    assert refusal.code == "repeated"
    inference.left(A)
    assert inference.done() == []


def test_generation_of_many_streams_is_one_cohort_and_takes_turns_with_evaluations() -> None:
    inference = Inference(100)
    inference.generate(ticket(A, 1, stream=1))
    inference.evaluate(ticket(A, 2))
    inference.evaluate(ticket(B, 2))
    inference.generate(ticket(C, 3, stream=1))
    inference.generate(ticket(A, 3, stream=2))
    assert inference.done() == [RunEvaluation((ticket(A, 2), ticket(B, 2)))]
    assert inference.done() == [RunGeneration((ticket(A, 3, stream=2), ticket(C, 3, stream=1)))]
    assert inference.done() == []


def test_streams_that_are_over_are_forgotten_in_one_work_at_a_time() -> None:
    inference = Inference(100)
    inference.generate(ticket(A, 1, stream=1))
    assert inference.release([(B, 1)]) == []
    assert inference.release([(B, 2), (C, 1)]) == []
    assert inference.done() == [ReleaseStreams(((B, 1), (B, 2), (C, 1)))]
    assert inference.release([]) == []
    assert inference.done() == []
