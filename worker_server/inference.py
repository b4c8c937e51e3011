"""Requests that train nothing: answered whenever the trunk is free, one cohort at a time, in order of arrival.

A state machine without I/O, beside the one of training.
"""

from worker_server.work import Instruction, RunEvaluation, Ticket, in_order, refuse


class Inference:
    """`max_batch_tokens` bounds a cohort; a session has one request waiting at most."""

    def __init__(self, max_batch_tokens: int) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.waiting: list[Ticket] = []
        self.running = False

    def evaluate(self, ticket: Ticket) -> list[Instruction]:
        if any(t.session == ticket.session for t in self.waiting):
            return [refuse(ticket, "repeated", "an evaluation of this session waits already")]
        self.waiting.append(ticket)
        return self._next()

    def left(self, session: bytes) -> None:
        """The session has ended."""
        self.waiting = [t for t in self.waiting if t.session != session]

    def done(self) -> list[Instruction]:
        """The cohort under way is answered."""
        self.running = False
        return self._next()

    def _next(self) -> list[Instruction]:
        if self.running or not self.waiting:
            return []
        self.running = True
        room = self.max_batch_tokens
        chosen: list[Ticket] = []
        while self.waiting and (not chosen or self.waiting[0].tokens <= room):
            chosen.append(self.waiting.pop(0))
            room -= chosen[-1].tokens
        return [RunEvaluation(in_order(chosen))]
