"""Plain FedAvg (McMahan et al., arXiv 1602.05629, algorithm 1): members train by themselves, updates alone come here.

A round is its members' updates: the last of them is waited for from the first on, until the deadline: that of a step
(cohort.deadline_s), for as many steps as a member trains before.
"""

from worker_server.deadlines import Deadlines
from worker_server.rounds import Rounds
from worker_server.work import Instruction, Ticket, refuse


class PlainFedavg(Rounds):
    def forward(self, ticket: Ticket, round: int, step: int, micro: int, now: float) -> list[Instruction]:
        return [refuse(ticket, "no_trunk", "clients hold the trunk themselves (split.trunk)")]

    def backward(self, ticket: Ticket, now: float) -> list[Instruction]:
        return [refuse(ticket, "no_trunk", "clients hold the trunk themselves (split.trunk)")]

    # Inside

    def _prepare(self) -> None:
        """Nothing of a round is kept but its updates."""
        plan = self.plan
        self.deadlines = Deadlines(plan.deadline_s, plan.deadline_mads, plan.deadline_s * plan.local_steps)

    def _next(self, now: float) -> list[Instruction]:
        return []

    def _forward_done(self, cohort: int) -> None:
        raise AssertionError("there are no forwards")

    def _backward_done(self, cohort: int) -> None:
        raise AssertionError("there are no backwards")

    def _late(self, now: float) -> list[bytes]:
        if self.updating_since is None or not any(now >= due for due in self._due()):
            return []
        missing = [session for session in self.active if session not in self.updates]
        self.deadlines.give_up(self._collecting, self.update_times, now - self.updating_since, len(missing))
        return missing

    def _due(self) -> list[float]:
        since = self.updating_since
        if since is None or self.active.keys() <= self.updates.keys():
            return []
        return [since + self.deadlines.of(self._collecting)]

    def _has_trained(self, session: bytes) -> bool:
        return True

    def _forget(self, session: bytes) -> None:
        """Nothing of a member is kept but its update."""

    def _ran(self) -> bool:
        return False

    def _reset(self) -> None:
        """Nothing was begun here."""
