"""Rounds: who takes part, when a round begins and ends, what becomes of who is late. A state machine without I/O.

    waiting ──enough clients joined──> training ──all members' updates in──> aggregating ──> waiting, or finished

The members of a round are fixed when it begins; who joins later waits for the next. A member that leaves, or keeps the
others waiting past the deadline, is left behind: it may join again for the next round. A round with fewer members left
than the quorum is undone (`Restore`), the others are sent back to its beginning (`Dismiss`), and it begins anew; where
members are late each time, MOST_TRIES times.

With sampling a round takes `sampled` clients, and the others stay in the lobby. They are drawn
(worker_server/sampling.py) from the clients that were known when the round before ended, and waited for, so that a
round that is undone, or a server that was started again, draws the same; with a smaller quorum the draw is among those
that are there.

A member whose update is refused has done its part: the round ends without that update, the member stays. Undoing the
round would bring the same update again.

Where updates are masked, a member's update is four messages in place of one (worker_server/masking.py), of a ring one,
or two where that is to be made (worker_server/ring.py). Each phase of the sum is collected as updates are, with the
same deadline: `updates` holds the phase's messages. Once members were asked to help unmask, or all inputs of a ring are
there (`Bind`), who is in the sum is settled: the round may only be done again among the same (two sums of the same
updates among different members differ by an update). So then a round that needs all of them waits until they are back;
a round that does not, ends without the sum if too few are left to unmask it, or come back to a server that was started
again. Who dealt wrong shares is barred.

Under a group's key the server cannot read the sum once the masks are off (`uncovered`). It asks one of those in it, the
first by name, to open it and seal the averages for all; if that one leaves or is late, the next, and so on. With nobody
left to ask the round is done again, or ends without its sum, as above; without it, too, where it did not open for one.

How the steps of a round are trained is for the two kinds of it: in lockstep (worker_server/lockstep.py) or greedily
(worker_server/greedy.py).

Events come in as method calls with the time; each returns the instructions to carry out, in order. An event that does
not fit the state yields a `Refuse` and changes nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from shared.errors import AggregationError, DeadlineExceeded, PeerError, ShareError
from shared.payload.messages import Mask
from shared.wire.envelope import Frame
from worker_server.deadlines import Deadlines, Kind
from worker_server.masking import OPENING, RoundSum
from worker_server.ring import AnySum, AnySums
from worker_server.sampling import drawn
from worker_server.work import (
    Aggregate,
    Bind,
    Dismiss,
    Finish,
    Instruction,
    Relay,
    Restore,
    StartRound,
    SumFailed,
    Ticket,
    in_order,
    refuse,
)

MOST_TRIES = 10
"""How often a round is begun that lateness of members undoes. Training is deterministic: once more ends the same."""

Stage = Literal["waiting", "training", "undoing", "aggregating", "finished"]


@dataclass(frozen=True)
class Plan:
    """What the job says about rounds. `places`: how many clients may take part at most, None for any number.

    `quorum`: with fewer members than that, which is one at least, no round begins or goes on. `replicated`: this is one
    of several servers, none of which begins before all have their clients; `never_idle`: and this one ends no round
    that none of its clients trained. `micro_batches` a step, of which a client may have `in_flight` under way;
    `patience_s` is greedy's. `sampled`: how many clients a round takes, None for all, drawn from `seed`;
    `deadline_mads`: how deadlines adapt (worker_server/deadlines.py), None if they do not.
    """

    clients: int
    rounds: int
    local_steps: int
    deadline_s: float
    quorum: int = 1
    places: int | None = None
    replicated: bool = False
    never_idle: bool = False
    micro_batches: int = 1
    in_flight: int = 1
    patience_s: float = 1.0
    max_batch_tokens: int = 2**24
    sampled: int | None = None
    seed: int = 0
    deadline_mads: float | None = None


class Rounds(ABC):
    """`plan.clients` start the job; at `round` a resumed one continues, with the clients `known` to it by then.

    `sums`: where updates are masked. `bound`: whose sum `round` is, if members were asked to unmask it before.
    """

    def __init__(
        self,
        plan: Plan,
        round: int = 0,
        known: Iterable[str] = (),
        sums: AnySums | None = None,
        bound: frozenset[str] = frozenset(),
    ) -> None:
        self.plan = plan
        self.sums = sums
        self.sum: AnySum | None = None
        self.bound = bound
        self.barred: set[str] = set()
        self.round = round
        self.known = frozenset(known)
        self.stage: Stage = "finished" if round >= plan.rounds else "waiting"
        self.started = False
        self.held = plan.replicated
        self.lobby: dict[bytes, Ticket] = {}
        self.active: dict[bytes, str] = {}
        self.updates: dict[bytes, Ticket] = {}
        self.last_members: frozenset[str] = frozenset()
        self.updating_since: float | None = None
        self.update_times: list[float] = []
        self.deadlines = Deadlines(plan.deadline_s, plan.deadline_mads)
        self.works = 0
        self.undone = self.tries = 0
        self._prepare()

    # What the kinds of training add

    @abstractmethod
    def _prepare(self) -> None:
        """What it keeps of a round, before the first."""

    @abstractmethod
    def forward(self, ticket: Ticket, round: int, step: int, micro: int, now: float) -> list[Instruction]:
        """Hidden states for micro-batch `micro` of a step."""

    @abstractmethod
    def backward(self, ticket: Ticket, now: float) -> list[Instruction]:
        """A gradient for the Forward of request `ticket.forward`."""

    @abstractmethod
    def _forward_done(self, cohort: int) -> None: ...

    @abstractmethod
    def _backward_done(self, cohort: int) -> None: ...

    @abstractmethod
    def _next(self, now: float) -> list[Instruction]:
        """The training works that can start."""

    @abstractmethod
    def _late(self, now: float) -> list[bytes]:
        """Members that have kept the others waiting for too long."""

    @abstractmethod
    def _due(self) -> list[float]:
        """When `tick` has something to do."""

    @abstractmethod
    def _has_trained(self, session: bytes) -> bool:
        """Whether this member has done all steps of the round."""

    @abstractmethod
    def _forget(self, session: bytes) -> None:
        """This member is gone."""

    @abstractmethod
    def _reset(self) -> None:
        """A round begins."""

    # Events from clients

    def joined(self, ticket: Ticket, now: float) -> list[Instruction]:
        if ticket.session in self.active or ticket.session in self.lobby:
            return [refuse(ticket, "joined_already", "this session has joined already")]
        if ticket.client in self.active.values() or any(t.client == ticket.client for t in self.lobby.values()):
            return [refuse(ticket, "name_in_use", f"a client named {ticket.client} is here already")]
        if self.stage == "finished":
            return [Finish((ticket,))]
        if ticket.client in self.barred:
            return [refuse(ticket, "share", "shares of this client's masks did not fit: the server takes it no more")]
        if self.plan.places is not None and len(self.active) + len(self.lobby) >= self.plan.places:
            return [refuse(ticket, "no_place", f"all {self.plan.places} places (cohort.clients) are taken")]
        self.lobby[ticket.session] = ticket
        return self._begin_round() if self.stage == "waiting" else []

    def update(self, ticket: Ticket, round: int, now: float) -> list[Instruction]:
        member = self.stage == "training" and ticket.session in self.active and round == self.round
        if not member or not self._has_trained(ticket.session):
            return [refuse(ticket, "wrong_step", f"round {self.round} is at stage {self.stage}")]
        if self.sum is not None:
            return [refuse(ticket, "masked", "the updates of this job are masked (aggregation.secure)")]
        if ticket.session in self.updates:
            return [refuse(ticket, "repeated", "this round's update came already")]
        return self._took(ticket, now)

    def mask(self, ticket: Ticket, message: Mask, frames: Sequence[Frame], now: float) -> list[Instruction]:
        """A member's next step in the round's masked sum. One that breaks its rules is refused, and changes nothing."""
        member = self.stage == "training" and ticket.session in self.active and message.round == self.round
        if self.sum is None or not member or not self._has_trained(ticket.session):
            return [refuse(ticket, "wrong_step", f"round {self.round} is at stage {self.stage}")]
        if ticket.session in self.updates:
            return [refuse(ticket, "repeated", "this phase's message came already")]
        try:
            self.sum.take(ticket.client, message, frames)
        except PeerError as error:
            return [refuse(ticket, error.code, error.message)]
        return self._took(ticket, now)

    def left(self, session: bytes, now: float) -> list[Instruction]:
        """The session has ended."""
        self.lobby.pop(session, None)
        return self._drop([session], now)

    @property
    def has_its_clients(self) -> bool:
        """Whether it has begun, or could."""
        return self.started or len(self.lobby) >= self.plan.clients

    @property
    def missing(self) -> int:
        """How many clients a round still waits for before it can begin."""
        if self.stage != "waiting":
            return 0
        if self.bound:
            return len(self.bound - {ticket.client for ticket in self.lobby.values()})
        if not self.started and len(self.lobby) < self.plan.clients:
            return self.plan.clients - len(self.lobby)
        return max(0, self.plan.quorum - len(self._drawn()))

    @property
    def awaited(self) -> list[str]:
        """Clients for whom the round waits: no others will do."""
        if self.stage != "waiting":
            return []
        here = {ticket.client for ticket in self.lobby.values()}
        if self.bound:
            return sorted(self.bound - here)
        if not self.started or self.plan.sampled is None:
            return []
        return sorted(client for client in self._draw(here) if client not in here)

    def all_have_their_clients(self) -> list[Instruction]:
        """Every replica may begin."""
        self.held = False
        return self._begin_round() if self.stage == "waiting" else []

    def wait_no_longer(self) -> list[Instruction]:
        """Clients of a job that was resumed, or of a round that was undone, have had their time to come back: rounds go
        on with those that the quorum asks for. A sum that was asked for before and lacks somebody is not made again.
        """
        plan = self.plan
        if self.stage != "waiting" or self.held:
            return []
        if self.missing and plan.quorum < len(self.bound) and plan.quorum <= len(self.lobby):
            gone = ", ".join(self.awaited)
            self.stage = "aggregating"
            failed = SumFailed(self.round, f"it can only be made again with {gone}, not back in time", ())
            return [failed, Aggregate(self.round, (), tuple(sorted(self.known)))]
        if self.round == 0 or self.started or (plan.sampled is None and plan.quorum >= plan.clients):
            return []
        self.started = True
        return self._begin_round()

    def only(self, admitted: frozenset[str]) -> list[Instruction]:
        """Who is not among `admitted` will not come (back): nobody waits for him if he was drawn."""
        if self.known <= admitted:
            return []
        self.known &= admitted
        return self._begin_round() if self.stage == "waiting" else []

    def ended_elsewhere(self) -> list[Instruction]:
        """Another replica ends this round; here nobody trains it: join in without an update, if that may be."""
        if self.stage != "waiting" or self.plan.never_idle:
            return []
        self.stage = "aggregating"
        return [Aggregate(self.round, ())]

    # Events from the compute thread

    def forward_done(self, cohort: int, now: float) -> list[Instruction]:
        self.works -= 1
        self._forward_done(cohort)
        return self._go_on(now)

    def backward_done(self, cohort: int, now: float) -> list[Instruction]:
        self.works -= 1
        self._backward_done(cohort)
        return self._go_on(now)

    def uncovered(self, now: float) -> list[Instruction]:
        """The masks are off the sum but for the group's."""
        assert isinstance(self.sum, RoundSum)
        self.sum.close(self.active.values())
        self.stage = "training"
        return self._ask_to_open(self.sum, now)

    def aggregation_done(self, failure: AggregationError | None = None) -> list[Instruction]:
        """`failure`: why there was no sum, if it could not be unmasked: nobody's update counted."""
        self.last_members = self.known | {ticket.client for ticket in self.updates.values()}
        if failure is None:
            return self._next_round([])
        named = self._bar(failure)
        reason = "the masked sum could not be had"
        self.updates = {s: replace(t, refused=t.refused or reason) for s, t in self.updates.items()}
        put_out: list[Instruction] = []
        for session, ticket in list(self.updates.items()):
            if ticket.client in self.barred:
                put_out.append(refuse(self.updates.pop(session), "share", "this client's shares did not fit"))
        return self._next_round([SumFailed(self.round, failure.message, named), *put_out])

    def _next_round(self, said: list[Instruction]) -> list[Instruction]:
        self.round, self.tries = self.round + 1, 0
        answers = [t for s, t in self.updates.items() if s in self.active]
        self.active = {}
        self._forget_updates()
        self.sum, self.bound = None, frozenset()
        if self.round >= self.plan.rounds:
            self.stage = "finished"
            answers += self.lobby.values()
            self.lobby = {}
            return [*said, Finish(in_order(answers))]
        # Who is not drawn waits, and his update must not.
        self.lobby.update({t.session: replace(t, payload=None) for t in answers})
        self.stage = "waiting"
        return [*said, *self._begin_round()]

    # Time

    def tick(self, now: float) -> list[Instruction]:
        """Leave behind the members that missed a deadline. Raises DeadlineExceeded where that undoes a round once more
        than MOST_TRIES allow.
        """
        if self.stage != "training":
            return []
        late, undone = tuple(self._late(now)), self.undone
        names = sorted(self.active[session] for session in late)
        ends = bool(late) and self.sum is not None and self.sum.ends_with_late
        goes_on = self._drop(late, now) or self._start(now)
        if late and self.undone > undone:
            self._check_tries(names)
        return [Dismiss(late, late=True), *goes_on] if ends else goes_on

    def _check_tries(self, late: Sequence[str]) -> None:
        self.tries += 1
        if self.tries == MOST_TRIES:
            raise DeadlineExceeded(
                f"round {self.round + 1} was begun {self.tries} times, and members were late each time, the last time "
                f"{', '.join(late)}",
                hint="make a job with a larger cohort.deadline_s, or with a cohort.quorum that can do without them",
            )

    def deadline(self) -> float | None:
        """When `tick` is next due."""
        return min(self._due(), default=None) if self.stage == "training" else None

    # Inside

    def _start(self, now: float) -> list[Instruction]:
        works = self._next(now)
        self.works += len(works)
        return works

    def _go_on(self, now: float) -> list[Instruction]:
        if self.stage == "undoing":
            return self._undo_round()
        return self._start(now) if self.stage == "training" else []

    def _took(self, ticket: Ticket, now: float) -> list[Instruction]:
        self.updates[ticket.session] = ticket
        if self.updating_since is None:
            self.updating_since = now
        self.update_times.append(now - self.updating_since)
        return self._end_round(now)

    def _end_round(self, now: float) -> list[Instruction]:
        if self.stage != "training" or not self.active.keys() <= self.updates.keys():
            return []
        self.deadlines.record(self._collecting, self.update_times)
        if self.sum is not None and not self.sum.unmasking:
            return self._next_phase(self.sum, now)
        if isinstance(self.sum, RoundSum) and self.sum.to_open:
            return self._ask_to_open(self.sum, now)
        return self._aggregate()

    def _aggregate(self) -> list[Instruction]:
        self.stage = "aggregating"
        counted = (t for s, t in self.updates.items() if s in self.active and t.refused is None)
        if self.plan.sampled is not None:
            self.known |= {*self.active.values(), *(ticket.client for ticket in self.lobby.values())}
        return [Aggregate(self.round, in_order(counted), tuple(sorted(self.known)), self.sum)]

    @property
    def _collecting(self) -> Kind:
        """What `updates` holds."""
        return "update" if self.sum is None else self.sum.collecting

    def _ask_to_open(self, sum: RoundSum, now: float) -> list[Instruction]:
        """What is due next is one member's, whose request is answered; all others wait."""
        openers = sum.openers()
        able = in_order(t for s, t in self.updates.items() if s in self.active and t.client in openers)
        if able:
            del self.updates[able[0].session]
            self.updating_since, self.update_times = now, []
            body, words = sum.ask(able[0].client)
            return [Relay(((able[0], body),), (words,))]
        if not sum.unopened and self.plan.quorum >= len(sum.summed):
            return self._undo()
        sum.give_up()
        return self._aggregate()

    def _next_phase(self, sum: AnySum, now: float) -> list[Instruction]:
        """Close this phase of the masked sum: those who are in the next are answered, the others wait for its end."""
        try:
            bodies = sum.close(self.active.values())
        except AggregationError as error:
            return [SumFailed(self.round, error.message, self._bar(error)), *self._undo()]
        if self.bound and sum.unmasking and self.bound != set(sum.summed):
            return [
                SumFailed(self.round, "not everybody is in it who was when it was asked for before", ()),
                *self._undo(),
            ]
        settled: list[Instruction] = []
        if sum.unmasking:
            self.bound = frozenset(sum.summed)
            settled.append(Bind(self.round, sum.summed))
        if not bodies:
            return [*settled, *self._aggregate()]
        tickets = in_order(t for s, t in self.updates.items() if s in self.active)
        answers = tuple((t, bodies[t.client]) for t in tickets if t.client in bodies and t.refused is None)
        answered = {ticket.session for ticket, _ in answers}
        self._forget_updates()
        self.updates = {
            ticket.session: replace(ticket, refused=ticket.refused or "left out of the masked sum: too few neighbours")
            for ticket in tickets
            if ticket.session not in answered
        }
        return [*settled, Relay(answers), *self._end_round(now)]

    def _bar(self, error: AggregationError) -> tuple[str, ...]:
        """Whoever is known to have dealt, or handed on, wrong shares. Who is only missing is not."""
        there = {ticket.client for ticket in self.updates.values()}
        named = tuple(name for name in error.clients if isinstance(error, ShareError) or name in there)
        self.barred.update(named)
        return named

    @property
    def _needed(self) -> int:
        """How many members must be left for the round to go on: the quorum, or what its sum takes if that is more."""
        if self.sum is None:
            return self.plan.quorum
        if self.sum.phase == OPENING:
            return 0  # one is enough, and without one _ask_to_open knows what is next
        if self.bound and not self.sum.unmasking:
            return len(self.bound)  # the sum was asked for before: again among the same, or not at all
        if self.sum.unmasking and self.plan.quorum < len(self.sum.summed):
            return 0  # it ends in any case: with the sum, or without
        return max(self.plan.quorum, self.sum.minimum)

    def _drop(self, sessions: Iterable[bytes], now: float) -> list[Instruction]:
        gone = [session for session in sessions if self.active.pop(session, None) is not None]
        if not gone or self.stage != "training":
            return []
        for session in gone:
            self.updates.pop(session, None)
            self._forget(session)
        if len(self.active) < self._needed:
            return self._undo()
        return self._end_round(now) or self._start(now)

    def _undo(self) -> list[Instruction]:
        self.stage = "undoing"
        self.undone += 1
        dismissed, self.active = tuple(self.active), {}
        return [*([Dismiss(dismissed)] if dismissed else []), *self._undo_round()]

    @abstractmethod
    def _ran(self) -> bool:
        """Whether anything of the round was computed."""

    def _undo_round(self) -> list[Instruction]:
        # Works under way come first: clients that come and go must not queue works without end.
        if self.works:
            return []
        # Nothing ran yet, nothing to undo.
        undo: list[Instruction] = [Restore(self.round)] if self._ran() else []
        self._forget_updates()
        self.sum = None
        self.stage = "waiting"
        return [*undo, *self._begin_round()]

    def _forget_updates(self) -> None:
        self.updates, self.updating_since, self.update_times = {}, None, []

    def _drawn(self) -> list[Ticket]:
        """Those of the lobby that the round takes."""
        here = {ticket.client: ticket for ticket in self.lobby.values()}
        if self.bound:
            return [ticket for client, ticket in here.items() if client in self.bound]
        return list(here.values()) if self.plan.sampled is None else [here[c] for c in self._draw(here) if c in here]

    def _draw(self, here: Collection[str]) -> list[str]:
        """The names that the round takes, there or not."""
        sampled = self.plan.sampled or 0
        among = {*here} if self.plan.quorum < sampled else {*self.known}
        if len(among) < sampled:
            among |= {*here}
        return drawn(among, sampled, self.plan.seed, self.round)

    def _begin_round(self) -> list[Instruction]:
        if not self.lobby or self.held or self.missing:
            return []
        self.started = True
        answers = in_order(self._drawn())
        if self.plan.sampled is not None and not self.known:
            self.known = frozenset(ticket.client for ticket in self.lobby.values())
        self.active = {ticket.session: ticket.client for ticket in answers}
        self.lobby = {session: ticket for session, ticket in self.lobby.items() if session not in self.active}
        self.stage = "training"
        self._reset()
        if self.sums is None:
            return [StartRound(self.round, answers)]
        publics = {ticket.client: ticket.public for ticket in answers}
        self.sum = self.sums.begin(self.round, publics, {ticket.client: ticket.session for ticket in answers})
        return [StartRound(self.round, answers, self.sum.announcement)]
