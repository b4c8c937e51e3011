"""Rounds in which members train by themselves: their updates are all that comes."""

from typing import Any

import pytest

from worker_server.plain_fedavg import PlainFedavg
from worker_server.rounds import Plan
from worker_server.work import Aggregate, Dismiss, Finish, Refuse, StartRound, Ticket

A, B = b"a" * 16, b"b" * 16
NAMES = {A: "anna", B: "berta"}


def ticket(session: bytes, request: int = 1, **fields: Any) -> Ticket:
    return Ticket(session, NAMES[session], request, None, **fields)


@pytest.fixture
def rounds() -> PlainFedavg:
    """Two members, in the first of two rounds, of which one is enough."""
    machine = PlainFedavg(Plan(clients=2, rounds=2, local_steps=3, deadline_s=10))
    machine.joined(ticket(A), 0)
    assert machine.joined(ticket(B), 0) == [StartRound(0, (ticket(A), ticket(B)))]
    return machine


def test_a_round_is_its_members_updates(rounds: PlainFedavg) -> None:
    assert rounds.update(ticket(B, 2), 0, 100) == []
    assert rounds.update(ticket(A, 2), 0, 101) == [Aggregate(0, (ticket(A, 2), ticket(B, 2)))]
    assert rounds.aggregation_done() == [StartRound(1, (ticket(A, 2), ticket(B, 2)))]
    rounds.update(ticket(A, 3), 1, 102)
    rounds.update(ticket(B, 3), 1, 103)
    assert rounds.aggregation_done() == [Finish((ticket(A, 3), ticket(B, 3)))]


def test_who_is_late_after_the_first_update_is_left_behind(rounds: PlainFedavg) -> None:
    assert rounds.deadline() is None
    assert rounds.tick(1000) == []
    rounds.update(ticket(A, 2), 0, 1000)
    assert rounds.deadline() == 1030  # three local steps, 10 s each
    assert rounds.tick(1029.9) == []
    assert rounds.tick(1030) == [Aggregate(0, (ticket(A, 2),))]
    [refused] = rounds.update(ticket(B, 2), 0, 1031)
    assert isinstance(refused, Refuse)
    assert refused.code == "wrong_step"


def test_a_round_without_its_quorum_is_begun_anew_and_there_is_nothing_to_undo() -> None:
    machine = PlainFedavg(Plan(clients=2, rounds=2, local_steps=3, deadline_s=10, quorum=2))
    machine.joined(ticket(A), 0)
    machine.joined(ticket(B), 0)
    machine.update(ticket(A, 2), 0, 1)
    assert machine.left(B, 2) == [Dismiss((A,))]
    machine.left(A, 3)
    machine.joined(ticket(A, 5), 4)
    assert machine.joined(ticket(B, 5), 4) == [StartRound(0, (ticket(A, 5), ticket(B, 5)))]
    assert machine.updates == {}


def test_the_trunks_work_is_refused_and_changes_nothing(rounds: PlainFedavg) -> None:
    for answer in (rounds.forward(ticket(A, 2), 0, 0, 0, 1), rounds.backward(ticket(A, 2), 1)):
        [refused] = answer
        assert isinstance(refused, Refuse)
        assert refused.code == "no_trunk"
    assert rounds.update(ticket(A, 3), 0, 2) == []


@pytest.mark.parametrize("round_", [1, 7])
def test_an_update_of_another_round_and_a_second_one_are_refused(rounds: PlainFedavg, round_: int) -> None:
    [refused] = rounds.update(ticket(A, 2), round_, 1)
    assert isinstance(refused, Refuse)
    assert rounds.update(ticket(A, 2), 0, 1) == []
    [refused] = rounds.update(ticket(A, 3), 0, 1)
    assert isinstance(refused, Refuse)
    assert refused.code == "repeated"
