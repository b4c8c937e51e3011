"""Who steps together, and when: the server's lockstep as a state machine without I/O.

    waiting ──enough clients joined──> forward ──all hidden states in──> forwarding ──done──> backward
                                          ^                                                      │
                                          │                                        all gradients in
                                          │                                                      v
                                          └──────────── next step, done <─────────────────── backwarding
    after the last step of a round: updating ──all updates in──> aggregating ──done──> forward (next round), or finished

The members of a round are fixed when it begins; who joins later waits for the next. A member that leaves, or misses the
deadline counted from the first request of a stage, is left behind: it may join again for the next round. A round that
loses all its members is undone (`Restore`) and begins anew.

Events come in as method calls with the time; each returns the instructions to carry out, in order. An event that does
not fit the state yields a `Refuse` and changes nothing.
"""

from collections.abc import Iterable
from typing import Literal

from worker_server.work import (
    Aggregate,
    Finish,
    Instruction,
    Restore,
    RunBackward,
    RunForward,
    StartRound,
    Ticket,
    in_order,
    refuse,
)

Stage = Literal["waiting", "forward", "forwarding", "backward", "backwarding", "updating", "aggregating", "finished"]
COLLECTING: frozenset[Stage] = frozenset({"forward", "backward", "updating"})


class Lockstep:
    """The state machine. `clients` start the job, at most `places` take part; at `round` a resumed one continues."""

    def __init__(
        self,
        *,
        clients: int,
        rounds: int,
        local_steps: int,
        deadline_s: float,
        round: int = 0,
        places: int | None = None,
    ) -> None:
        self.clients = clients
        self.places = places
        self.rounds = rounds
        self.local_steps = local_steps
        self.deadline_s = deadline_s
        self.round = round
        self.step = 0
        self.stage: Stage = "finished" if round >= rounds else "waiting"
        self.started = False
        self.lobby: dict[bytes, Ticket] = {}
        self.active: dict[bytes, str] = {}
        self.forwards: dict[bytes, Ticket] = {}
        self.gradients: dict[bytes, Ticket] = {}
        self.updates: dict[bytes, Ticket] = {}
        self.since: float | None = None

    # Events from clients

    def joined(self, ticket: Ticket, now: float) -> list[Instruction]:
        if ticket.session in self.active or ticket.session in self.lobby:
            return [refuse(ticket, "joined_already", "this session has joined already")]
        if ticket.client in self.active.values() or any(t.client == ticket.client for t in self.lobby.values()):
            return [refuse(ticket, "name_in_use", f"a client named {ticket.client} is here already")]
        if self.stage == "finished":
            return [Finish((ticket,))]
        if self.places is not None and len(self.active) + len(self.lobby) >= self.places:
            return [refuse(ticket, "no_place", f"all {self.places} places (cohort.clients) are taken")]
        self.lobby[ticket.session] = ticket
        return self._begin_round() if self.stage == "waiting" else []

    def forward(self, ticket: Ticket, round: int, step: int, now: float) -> list[Instruction]:
        if ticket.session not in self.active:
            return [refuse(ticket, "not_in_round", "not a member of this round; join and wait for the next")]
        if (round, step) != (self.round, self.step) or self.stage != "forward":
            return [refuse(ticket, "wrong_step", f"round {self.round}, step {self.step} is at stage {self.stage}")]
        if ticket.session in self.forwards:
            return [refuse(ticket, "repeated", "this step's hidden states came already")]
        self.forwards[ticket.session] = ticket
        return self._arrived(now)

    def backward(self, ticket: Ticket, now: float) -> list[Instruction]:
        forward = self.forwards.get(ticket.session)
        if self.stage != "backward" or forward is None or forward.request != ticket.forward:
            return [refuse(ticket, "wrong_step", f"no hidden states of request {ticket.forward} wait for a gradient")]
        if ticket.tokens != forward.tokens:
            return [refuse(ticket, "tensor", f"a gradient of {ticket.tokens} rows for {forward.tokens} hidden states")]
        if ticket.session in self.gradients:
            return [refuse(ticket, "repeated", "this step's gradient came already")]
        self.gradients[ticket.session] = ticket
        return self._arrived(now)

    def update(self, ticket: Ticket, round: int, now: float) -> list[Instruction]:
        if self.stage != "updating" or ticket.session not in self.active or round != self.round:
            return [refuse(ticket, "wrong_step", f"round {self.round} is at stage {self.stage}")]
        if ticket.session in self.updates:
            return [refuse(ticket, "repeated", "this round's update came already")]
        self.updates[ticket.session] = ticket
        return self._arrived(now)

    def left(self, session: bytes, now: float) -> list[Instruction]:
        """The session has ended."""
        self.lobby.pop(session, None)
        return self._drop([session], now)

    # Events from the compute thread

    def forward_done(self) -> list[Instruction]:
        self.stage = "backward"
        return self._advance()

    def backward_done(self) -> list[Instruction]:
        self.forwards, self.gradients = {}, {}
        self.step += 1
        self.stage = "forward" if self.step < self.local_steps else "updating"
        return self._advance()

    def aggregation_done(self) -> list[Instruction]:
        self.round += 1
        self.step = 0
        answers = [t for s, t in self.updates.items() if s in self.active]
        self.active, self.updates = {}, {}
        if self.round >= self.rounds:
            self.stage = "finished"
            answers += self.lobby.values()
            self.lobby = {}
            return [Finish(in_order(answers))]
        self.lobby.update({t.session: t for t in answers})
        self.stage = "waiting"
        return self._begin_round()

    # Time

    def tick(self, now: float) -> list[Instruction]:
        """Leave behind the members that missed the stage's deadline."""
        if self.stage not in COLLECTING or self.since is None or now - self.since < self.deadline_s:
            return []
        collected = self._collected()
        return self._drop([session for session in self.active if session not in collected], now)

    def deadline(self) -> float | None:
        """When `tick` is next due, if a stage is being collected."""
        return self.since + self.deadline_s if self.since is not None and self.stage in COLLECTING else None

    # Inside

    def _collected(self) -> dict[bytes, Ticket]:
        return {"forward": self.forwards, "backward": self.gradients, "updating": self.updates}[self.stage]

    def _arrived(self, now: float) -> list[Instruction]:
        if self.since is None:
            self.since = now
        return self._advance()

    def _advance(self) -> list[Instruction]:
        """Start the next work if all that it needs is here."""
        if not self.active and self.stage in COLLECTING:
            return self._undo_round()
        if self.stage in COLLECTING and self.active.keys() <= self._collected().keys():
            self.since = None
            if self.stage == "forward":
                self.stage = "forwarding"
                return [RunForward(in_order(self.forwards.values()))]
            if self.stage == "backward":
                self.stage = "backwarding"
                return [RunBackward(in_order(self.forwards.values()), dict(self.gradients))]
            self.stage = "aggregating"
            return [Aggregate(self.round, in_order(self.updates.values()))]
        return []

    def _drop(self, sessions: Iterable[bytes], now: float) -> list[Instruction]:
        gone = [session for session in sessions if self.active.pop(session, None) is not None]
        if not gone:
            return []
        for session in gone:
            if self.stage == "forward":
                self.forwards.pop(session, None)
            if self.stage in ("backward", "updating"):
                self._collected().pop(session, None)
        return self._advance()

    def _undo_round(self) -> list[Instruction]:
        # Nothing ran yet, nothing to undo: clients that come and go must not queue restores without end.
        undo = [] if (self.stage, self.step) == ("forward", 0) else [Restore(self.round)]
        self.step = 0
        self.forwards, self.gradients, self.updates = {}, {}, {}
        self.since = None
        self.stage = "waiting"
        return [*undo, *self._begin_round()]

    def _begin_round(self) -> list[Instruction]:
        if len(self.lobby) < (1 if self.started else self.clients):
            return []
        self.started = True
        answers = in_order(self.lobby.values())
        self.active = {ticket.session: ticket.client for ticket in answers}
        self.lobby = {}
        self.stage = "forward"
        return [StartRound(self.round, answers)]
