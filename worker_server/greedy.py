"""Greedy: whenever the trunk is free it takes what is there. Nobody waits for a slower member until the round's end.

Each member has up to `in_flight` steps under way. A forward takes one request of each member that has one waiting, the
least served first, up to `max_batch_tokens`. A cohort's backward runs when its gradients are in; who lets the others
wait longer than `patience_s` is late: the backward runs without him, and his own rows are computed again when his
gradient comes. Every backward is an optimizer step; the schedule moves by the share of the members that are in it, so
that after a round it is where lockstep's would be.

Not exact: a step's gradient belongs to the parameters that its forward used, and other steps may have come between.
"""

from dataclasses import dataclass, field

from worker_server.rounds import Rounds
from worker_server.work import Instruction, RunBackward, RunForward, Ticket, in_order, refuse


@dataclass
class Cohort:
    """Requests that shared a forward. `missing`: sessions whose gradients are to come; `since`: when the first came."""

    number: int
    forwards: dict[bytes, Ticket]
    missing: set[bytes]
    computed: bool = False
    gradients: dict[bytes, Ticket] = field(default_factory=dict)
    since: float | None = None


@dataclass
class Member:
    """`sent` and `done` steps of the round; `heard`: when the last request came."""

    heard: float
    sent: int = 0
    done: int = 0


class Greedy(Rounds):
    def _prepare(self) -> None:
        self.members: dict[bytes, Member] = {}
        self.waiting: dict[bytes, list[Ticket]] = {}
        self.cohorts: dict[int, Cohort] = {}
        self.backwards: dict[int, tuple[Ticket, ...]] = {}
        self.numbered = 0
        self.first = 0

    def forward(self, ticket: Ticket, round: int, step: int, micro: int, now: float) -> list[Instruction]:
        member = self.members.get(ticket.session)
        if member is None or ticket.session not in self.active:
            return [refuse(ticket, "not_in_round", "not a member of this round; join and wait for the next")]
        fits = (round, step, micro) == (self.round, member.sent, 0) and step < self.plan.local_steps
        if self.stage != "training" or not fits:
            return [refuse(ticket, "wrong_step", f"round {self.round}, step {member.sent} is at stage {self.stage}")]
        if member.sent - member.done >= self.plan.in_flight:
            text = f"{self.plan.in_flight} steps (cohort.in_flight) are under way already"
            return [refuse(ticket, "too_many_in_flight", text)]
        member.sent += 1
        member.heard = now
        self.waiting.setdefault(ticket.session, []).append(ticket)
        return self._start(now)

    def backward(self, ticket: Ticket, now: float) -> list[Instruction]:
        cohort = self._waiting_for(ticket)
        if self.stage != "training" or cohort is None:
            return [refuse(ticket, "wrong_step", f"no hidden states of request {ticket.forward} wait for a gradient")]
        rows = cohort.forwards[ticket.session].tokens
        if ticket.tokens != rows:
            return [refuse(ticket, "tensor", f"a gradient of {ticket.tokens} rows for {rows} hidden states")]
        if ticket.session in cohort.gradients:
            return [refuse(ticket, "repeated", "this step's gradient came already")]
        self.members[ticket.session].heard = now
        cohort.gradients[ticket.session] = ticket
        if cohort.since is None:
            cohort.since = now
        return self._start(now)

    # Inside

    def _waiting_for(self, ticket: Ticket) -> Cohort | None:
        for cohort in self.cohorts.values():
            forward = cohort.forwards.get(ticket.session)
            if forward is not None and forward.request == ticket.forward:
                return cohort if cohort.computed and ticket.session in cohort.missing else None
        return None

    def _next(self, now: float) -> list[Instruction]:
        """One work at a time, so that what is taken next is decided when the trunk is free: gradients first."""
        if self.works:
            return []
        return self._ready_backward(now) or self._waiting_forward()

    def _ready_backward(self, now: float) -> list[Instruction]:
        for cohort in self.cohorts.values():
            complete = cohort.computed and cohort.missing <= cohort.gradients.keys()
            overdue = cohort.since is not None and now - cohort.since >= self.plan.patience_s
            if complete or overdue:
                return [self._backward(cohort, complete)]
        return []

    def _backward(self, cohort: Cohort, complete: bool) -> RunBackward:
        gradients, cohort.gradients, cohort.since = cohort.gradients, {}, None
        cohort.missing -= gradients.keys()
        if complete:
            del self.cohorts[cohort.number]
        self.backwards[cohort.number] = tuple(gradients.values())
        steps = len(gradients) / max(1, len(self.active)) if gradients else None
        return RunBackward(cohort.number, in_order(cohort.forwards.values()), gradients, steps, complete)

    def _waiting_forward(self) -> list[Instruction]:
        """The first waiting request of each member, least served first, as far as the budget goes."""
        room = self.plan.max_batch_tokens
        chosen: dict[bytes, Ticket] = {}
        for session in sorted(
            self.waiting, key=lambda s: (self.members[s].sent - len(self.waiting[s]), self.active[s])
        ):
            ticket = self.waiting[session][0]
            if ticket.tokens <= room:
                room -= ticket.tokens
                chosen[session] = ticket
        if not chosen:
            return []
        for session in chosen:
            del self.waiting[session][0]
            if not self.waiting[session]:
                del self.waiting[session]
        cohort = Cohort(self.numbered, chosen, set(chosen))
        self.cohorts[cohort.number] = cohort
        self.numbered += 1
        return [RunForward(cohort.number, in_order(chosen.values()))]

    def _forward_done(self, cohort: int) -> None:
        if cohort in self.cohorts:
            self.cohorts[cohort].computed = True

    def _backward_done(self, cohort: int) -> None:
        for ticket in self.backwards.pop(cohort, ()):
            if ticket.session in self.active:
                self.members[ticket.session].done += 1

    def _late(self, now: float) -> list[bytes]:
        return [s for s in self._owing() if now - self._owing_since(s) >= self.plan.deadline_s]

    def _owing(self) -> list[bytes]:
        """While others have ended their round: members from whom something must come next."""
        if self.updating_since is None:
            return []
        busy = self.waiting.keys() | {t.session for tickets in self.backwards.values() for t in tickets}
        busy |= {s for cohort in self.cohorts.values() if not cohort.computed for s in cohort.forwards}
        busy |= {s for cohort in self.cohorts.values() for s in cohort.gradients}
        return [session for session in self.active if session not in self.updates and session not in busy]

    def _owing_since(self, session: bytes) -> float:
        return max(self.members[session].heard, self.updating_since or 0.0)

    def _due(self) -> list[float]:
        due = [self._owing_since(session) + self.plan.deadline_s for session in self._owing()]
        if not self.works:
            due += [c.since + self.plan.patience_s for c in self.cohorts.values() if c.since is not None]
        return due

    def _has_trained(self, session: bytes) -> bool:
        return self.members[session].done == self.plan.local_steps

    def _forget(self, session: bytes) -> None:
        self.waiting.pop(session, None)
        for cohort in self.cohorts.values():
            cohort.missing.discard(session)
            cohort.gradients.pop(session, None)

    def _ran(self) -> bool:
        return self.numbered > self.first

    def _reset(self) -> None:
        self.members = {session: Member(0.0) for session in self.active}
        self.waiting, self.cohorts, self.backwards = {}, {}, {}
        self.first = self.numbered
