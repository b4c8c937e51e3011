"""Requests that train nothing: answered whenever the trunk is free, one cohort at a time, in order of arrival.

A state machine without I/O, beside the one of training.
"""

from collections.abc import Iterable

from worker_server.work import Instruction, ReleaseStreams, RunEvaluation, RunGeneration, Ticket, Work, in_order, refuse


class Inference:
    """One work at a time. `max_batch_tokens` bounds a cohort; evaluations and generation take turns where both wait."""

    def __init__(self, max_batch_tokens: int) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.evaluations: list[Ticket] = []
        self.generations: list[Ticket] = []
        self.released: list[tuple[bytes, int]] = []
        self.running = False
        self.generated_last = False

    def evaluate(self, ticket: Ticket) -> list[Instruction]:
        """A session has one evaluation waiting at most."""
        if any(t.session == ticket.session for t in self.evaluations):
            return [refuse(ticket, "repeated", "an evaluation of this session waits already")]
        self.evaluations.append(ticket)
        return self._next()

    def generate(self, ticket: Ticket) -> list[Instruction]:
        """The caller sees to it that a stream has one request under way at most (worker_server/streams.py)."""
        self.generations.append(ticket)
        return self._next()

    def release(self, streams: Iterable[tuple[bytes, int]]) -> list[Instruction]:
        """These streams, of which none is waiting or under way, are over."""
        self.released += streams
        return self._next()

    def left(self, session: bytes) -> None:
        """The session has ended."""
        self.evaluations = [t for t in self.evaluations if t.session != session]
        self.generations = [t for t in self.generations if t.session != session]

    def done(self) -> list[Instruction]:
        """The cohort under way is answered."""
        self.running = False
        return self._next()

    def _next(self) -> list[Instruction]:
        if self.running:
            return []
        work = self._choose()
        self.running = work is not None
        return [] if work is None else [work]

    def _choose(self) -> Work | None:
        if self.released:
            streams, self.released = tuple(self.released), []
            return ReleaseStreams(streams)
        if self.generations and not (self.evaluations and self.generated_last):
            self.generated_last = True
            return RunGeneration(in_order(self._take(self.generations)))
        if self.evaluations:
            self.generated_last = False
            return RunEvaluation(in_order(self._take(self.evaluations)))
        return None

    def _take(self, waiting: list[Ticket]) -> list[Ticket]:
        """The first that waits, and as many after it as the budget lets."""
        room = self.max_batch_tokens
        chosen: list[Ticket] = []
        while waiting and (not chosen or waiting[0].tokens <= room):
            chosen.append(waiting.pop(0))
            room -= chosen[-1].tokens
        return chosen
