"""Random histories of both kinds of rounds: no order of events breaks them, and clients that go on reach the end."""

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker_server.greedy import Greedy
from worker_server.lockstep import Lockstep
from worker_server.rounds import Plan, Rounds
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

SESSIONS = [b"a" * 16, b"b" * 16, b"c" * 16]
NAMES = dict(zip(SESSIONS, ["anna", "berta", "clara"], strict=True))


def ticket(session: bytes, request: int = 1, **fields: Any) -> Ticket:
    return Ticket(session, NAMES[session], request, None, **fields)


class Histories(RuleBasedStateMachine):
    """Any events in any order, due or not."""

    def __init__(self, rounds: Rounds) -> None:
        super().__init__()
        self.rounds = rounds
        self.queue: list[Work] = []
        self.open: set[int] = set()
        self.now = 0.0

    def carry(self, instructions: list[Instruction]) -> None:
        active = set(self.rounds.active)
        for instruction in instructions:
            match instruction:
                case RunForward(cohort, tickets):
                    assert cohort not in self.open
                    self.open.add(cohort)
                    assert {t.session for t in tickets} <= active
                    assert [t.client for t in tickets] == sorted({t.client for t in tickets})
                case RunBackward(cohort, forwards, gradients, _, last):
                    assert cohort in self.open
                    assert gradients.keys() <= {t.session for t in forwards}
                    if last:
                        self.open.remove(cohort)
                case Aggregate(_, updates):
                    assert {t.session for t in updates} == active
                case Restore():
                    self.open.clear()
            if isinstance(instruction, Work):
                self.queue.append(instruction)

    @rule(session=st.sampled_from(SESSIONS))
    def join(self, session: bytes) -> None:
        self.carry(self.rounds.joined(ticket(session), self.now))

    @rule(session=st.sampled_from(SESSIONS), step=st.integers(0, 2), micro=st.integers(0, 2))
    def forward(self, session: bytes, step: int, micro: int) -> None:
        request = 1 + 10 * step + micro
        self.carry(self.rounds.forward(ticket(session, request), self.rounds.round, step, micro, self.now))

    @rule(session=st.sampled_from(SESSIONS), step=st.integers(0, 2), micro=st.integers(0, 2))
    def backward(self, session: bytes, step: int, micro: int) -> None:
        self.carry(self.rounds.backward(ticket(session, 99, forward=1 + 10 * step + micro), self.now))

    @rule(session=st.sampled_from(SESSIONS))
    def update(self, session: bytes) -> None:
        self.carry(self.rounds.update(ticket(session, 8, weight=1), self.rounds.round, self.now))

    @rule(session=st.sampled_from(SESSIONS))
    def leave(self, session: bytes) -> None:
        self.carry(self.rounds.left(session, self.now))

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.carry(self.rounds.tick(self.now))

    @precondition(lambda self: self.queue)
    @rule()
    def computed(self) -> None:
        self.carry(done(self.rounds, self.queue.pop(0), self.now))

    @invariant()
    def the_queue_of_works_is_short(self) -> None:
        assert len(self.queue) <= 2 * self.rounds.plan.micro_batches + 2

    @invariant()
    def no_deadline_has_passed_after_a_tick(self) -> None:
        """A server that sleeps until the next deadline does not spin."""
        self.carry(self.rounds.tick(self.now))
        due = self.rounds.deadline()
        assert due is None or due > self.now


def done(rounds: Rounds, work: Work, now: float) -> list[Instruction]:
    match work:
        case RunForward():
            return rounds.forward_done(work.cohort, now)
        case RunBackward():
            return rounds.backward_done(work.cohort, now)
        case Aggregate():
            return rounds.aggregation_done()
    return []


def plan(micro_batches: int = 1, in_flight: int = 1, sampled: int | None = None) -> Plan:
    return Plan(
        clients=2,
        rounds=3,
        local_steps=2,
        deadline_s=10,
        micro_batches=micro_batches,
        in_flight=in_flight,
        patience_s=2,
        sampled=sampled,
    )


class LockstepHistories(Histories):
    def __init__(self) -> None:
        super().__init__(Lockstep(plan(micro_batches=2, in_flight=2)))


class GreedyHistories(Histories):
    def __init__(self) -> None:
        super().__init__(Greedy(plan(in_flight=2)))


class SampledHistories(Histories):
    def __init__(self) -> None:
        super().__init__(Lockstep(plan(micro_batches=2, in_flight=2, sampled=1)))


for machine in (LockstepHistories, GreedyHistories, SampledHistories):
    machine.TestCase.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
TestLockstep = LockstepHistories.TestCase
TestGreedy = GreedyHistories.TestCase
TestSampled = SampledHistories.TestCase


class Client:
    """Does what is due, some time; counts what was done for it."""

    def __init__(self, session: bytes, plan: Plan) -> None:
        self.session = session
        self.plan = plan
        self.round: int | None = None
        self.finished = False
        self.begin(None)

    def begin(self, round: int | None) -> None:
        self.round = round
        self.sent = 0
        self.answered: list[int] = []
        self.owed: list[int] = []
        self.turned = 0
        self.done = 0
        self.updated = False

    def act(self, rounds: Rounds, now: float, greedy: bool) -> list[Instruction]:
        a = 1 if greedy else self.plan.micro_batches
        total = self.plan.local_steps * a
        if self.round is None:
            return [] if self.finished else rounds.joined(ticket(self.session), now)
        if self.answered and random.random() < 0.5:
            return rounds.backward(ticket(self.session, 1000 + self.answered[0], forward=self.answered.pop(0)), now)
        same_step = greedy or self.sent // a == self.done // a
        if self.sent < total and self.sent - self.done < self.plan.in_flight and same_step:
            self.sent += 1
            request, (step, micro) = self.sent, divmod(self.sent - 1, a)
            return rounds.forward(ticket(self.session, request), self.round, step, micro, now)
        if self.done == total and not self.updated:
            self.updated = True
            return rounds.update(ticket(self.session, 5000, weight=1), self.round, now)
        return []


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("sampled", [None, 1])
@pytest.mark.parametrize("greedy", [False, True])
def test_clients_that_go_on_come_to_the_end(greedy: bool, sampled: int | None, seed: int) -> None:
    """Whoever is fast, whoever leaves and comes back: all steps of every round are done, each once."""
    random.seed(seed)
    its_plan = plan(1 if greedy else 3, in_flight=2, sampled=sampled)
    rounds: Rounds = Greedy(its_plan) if greedy else Lockstep(its_plan)
    clients = {session: Client(session, its_plan) for session in SESSIONS}
    queue: list[Work] = []
    now, leaves = 0.0, 3

    def carry(instructions: list[Instruction]) -> None:
        for instruction in instructions:
            assert not isinstance(instruction, Refuse), instruction
            match instruction:
                case StartRound(round, answers):
                    for answer in answers:
                        clients[answer.session].begin(round)
                case Finish(answers):
                    for answer in answers:
                        clients[answer.session].begin(None)
                        clients[answer.session].finished = True
            if isinstance(instruction, Work):
                queue.append(instruction)

    waiting = set(SESSIONS)
    for _ in range(4000):
        if all(client.finished for client in clients.values()):
            break
        now += random.random()
        if queue and random.random() < 0.4:
            work = queue.pop(0)
            if isinstance(work, RunForward):
                for each in work.tickets:
                    if each.session in rounds.active:
                        clients[each.session].answered.append(each.request)
            if isinstance(work, RunBackward):
                for session in work.gradients:
                    clients[session].done += session in rounds.active
            carry(done(rounds, work, now))
        elif leaves and random.random() < 0.02:
            leaves -= 1
            session = random.choice(SESSIONS)
            clients[session].begin(None)
            waiting.add(session)
            carry(rounds.left(session, now))
        else:
            session = random.choice(SESSIONS)
            if clients[session].round is None:
                if session not in waiting:
                    continue
                waiting.discard(session)
            carry(clients[session].act(rounds, now, greedy))
        before = rounds.deadline()
        if before is not None and before <= now:
            now = before
    assert all(client.finished for client in clients.values())
    assert rounds.round == its_plan.rounds
