"""Lockstep: every step waits for all members, in a fixed order; the same sums in the same order, whoever is faster.

A step is `micro_batches` cohorts, each one forward and one backward of all members' rows, then one optimizer step. A
client may have several of a step's micro-batches under way: parameters do not change within a step, so that nothing is
approximate about it. Cohorts run in the order of their micro-batches, forwards and backwards each.

    a cohort: forward ──all hidden states in──> forwarding ──done──> backward ──all gradients in──> backwarding ──> done
"""

from dataclasses import dataclass, field
from typing import Literal

from worker_server.deadlines import Kind
from worker_server.rounds import Rounds
from worker_server.work import Instruction, RunBackward, RunForward, Ticket, in_order, refuse


@dataclass
class Cohort:
    """All members' requests for one micro-batch. `since`: when the first request of the stage came; `times`: how long
    after it each of them.
    """

    number: int
    stage: Literal["forward", "forwarding", "backward", "backwarding", "done"] = "forward"
    forwards: dict[bytes, Ticket] = field(default_factory=dict)
    gradients: dict[bytes, Ticket] = field(default_factory=dict)
    since: float | None = None
    times: list[float] = field(default_factory=list)

    def collected(self) -> dict[bytes, Ticket] | None:
        """Where the requests go that the stage waits for."""
        return {"forward": self.forwards, "backward": self.gradients}.get(self.stage)


@dataclass(frozen=True)
class Collection:
    """Requests of a kind that come in: since when, from whom not yet, and the members' times."""

    kind: Kind
    since: float
    missing: list[bytes]
    times: list[float]


class Lockstep(Rounds):
    def _prepare(self) -> None:
        self.step = 0
        self.cohorts: list[Cohort] = []
        self.numbered = 0

    def forward(self, ticket: Ticket, round: int, step: int, micro: int, now: float) -> list[Instruction]:
        if ticket.session not in self.active:
            return [refuse(ticket, "not_in_round", "not a member of this round; join and wait for the next")]
        if (round, step) != (self.round, self.step) or self.stage != "training" or micro >= len(self.cohorts):
            return [refuse(ticket, "wrong_step", f"round {self.round}, step {self.step} is at stage {self.stage}")]
        cohort = self.cohorts[micro]
        if cohort.stage != "forward":
            return [refuse(ticket, "wrong_step", f"round {round}, step {step} is at stage {cohort.stage}")]
        if ticket.session in cohort.forwards:
            return [refuse(ticket, "repeated", "this step's hidden states came already")]
        if sum(ticket.session in c.forwards and c.stage != "done" for c in self.cohorts) >= self.plan.in_flight:
            text = f"{self.plan.in_flight} micro-batches (cohort.in_flight) are under way already"
            return [refuse(ticket, "too_many_in_flight", text)]
        cohort.forwards[ticket.session] = ticket
        return self._arrived(cohort, now)

    def backward(self, ticket: Ticket, now: float) -> list[Instruction]:
        cohort = self._waiting_for(ticket)
        if self.stage != "training" or cohort is None:
            return [refuse(ticket, "wrong_step", f"no hidden states of request {ticket.forward} wait for a gradient")]
        rows = cohort.forwards[ticket.session].tokens
        if ticket.tokens != rows:
            return [refuse(ticket, "tensor", f"a gradient of {ticket.tokens} rows for {rows} hidden states")]
        if ticket.session in cohort.gradients:
            return [refuse(ticket, "repeated", "this step's gradient came already")]
        cohort.gradients[ticket.session] = ticket
        return self._arrived(cohort, now)

    # Inside

    def _waiting_for(self, ticket: Ticket) -> Cohort | None:
        for cohort in self.cohorts:
            forward = cohort.forwards.get(ticket.session)
            if cohort.stage == "backward" and forward is not None and forward.request == ticket.forward:
                return cohort
        return None

    def _arrived(self, cohort: Cohort, now: float) -> list[Instruction]:
        if cohort.since is None:
            cohort.since = now
        cohort.times.append(now - cohort.since)
        return self._start(now)

    def _next(self, now: float) -> list[Instruction]:
        """Start what has all it needs, in the order of micro-batches."""
        works: list[Instruction] = []
        for cohort in self.cohorts:
            if cohort.stage == "forward":
                if not self._complete(cohort):
                    break
                self._collected(cohort)
                cohort.stage = "forwarding"
                works.append(RunForward(cohort.number, in_order(cohort.forwards.values())))
        for place, cohort in enumerate(self.cohorts):
            if cohort.stage in ("backwarding", "done"):
                continue
            if cohort.stage != "backward" or not self._complete(cohort):
                break
            self._collected(cohort)
            cohort.stage = "backwarding"
            steps = 1.0 if place == len(self.cohorts) - 1 else None
            forwards = in_order(cohort.forwards.values())
            works.append(RunBackward(cohort.number, forwards, dict(cohort.gradients), steps))
        return works

    def _collected(self, cohort: Cohort) -> None:
        self.deadlines.record(self._kind(cohort), cohort.times)
        cohort.since, cohort.times = None, []

    def _kind(self, cohort: Cohort) -> Kind:
        if cohort.stage == "backward":
            return "backward"
        return "first" if self.step == 0 else "forward"

    def _complete(self, cohort: Cohort) -> bool:
        collected = cohort.collected()
        return collected is not None and self.active.keys() <= collected.keys()

    def _forward_done(self, cohort: int) -> None:
        for candidate in self.cohorts:
            if candidate.number == cohort:
                candidate.stage = "backward"

    def _backward_done(self, cohort: int) -> None:
        for candidate in self.cohorts:
            if candidate.number == cohort:
                candidate.stage = "done"
        if all(candidate.stage == "done" for candidate in self.cohorts):
            self.step += 1
            self._new_step()

    def _late(self, now: float) -> list[bytes]:
        late: list[bytes] = []
        for collection in self._collections():
            if now - collection.since >= self.deadlines.of(collection.kind):
                late += collection.missing
                self.deadlines.give_up(
                    collection.kind, collection.times, now - collection.since, len(collection.missing)
                )
        return late

    def _due(self) -> list[float]:
        return [collection.since + self.deadlines.of(collection.kind) for collection in self._collections()]

    def _collections(self) -> list[Collection]:
        """What is being collected and lacks somebody."""
        found = []
        for cohort in self.cohorts:
            collected = cohort.collected()
            if cohort.since is not None and collected is not None and (missing := self._lacks(collected)):
                found.append(Collection(self._kind(cohort), cohort.since, missing, cohort.times))
        if self.updating_since is not None and (missing := self._lacks(self.updates)):
            found.append(Collection(self._collecting, self.updating_since, missing, self.update_times))
        return found

    def _lacks(self, collected: dict[bytes, Ticket]) -> list[bytes]:
        return [session for session in self.active if session not in collected]

    def _has_trained(self, session: bytes) -> bool:
        return self.step == self.plan.local_steps

    def _forget(self, session: bytes) -> None:
        for cohort in self.cohorts:
            collected = cohort.collected()
            if collected is not None:
                collected.pop(session, None)

    def _ran(self) -> bool:
        return self.step > 0 or any(cohort.stage != "forward" for cohort in self.cohorts)

    def _reset(self) -> None:
        self.step = 0
        self._new_step()

    def _new_step(self) -> None:
        count = self.plan.micro_batches if self.step < self.plan.local_steps else 0
        self.cohorts = [Cohort(self.numbered + index) for index in range(count)]
        self.numbered += count
