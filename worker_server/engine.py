"""The compute thread: the one owner of the trunk. Work in, outcomes out, in order.

It knows no sockets and no sessions. An error in it is kept and raised to whoever collects the outcomes.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

import torch
from torch import Tensor

from shared.errors import AggregationError
from shared.job import CentralPrivacy
from shared.logs import event
from worker_server.aggregators.method import Update
from worker_server.masking import Summed
from worker_server.progress import Progress
from worker_server.replicas import Replicas
from worker_server.ring import AnySum
from worker_server.round_end import aggregate
from worker_server.streams import StreamCaches
from worker_server.telling import tell
from worker_server.trunk import Trunk
from worker_server.work import (
    Aggregate,
    ReleaseStreams,
    Restore,
    RunBackward,
    RunEvaluation,
    RunForward,
    RunGeneration,
    Ticket,
    Work,
)

QUEUE_LENGTH = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Computed:
    """The outcome of `work`: a tensor for each ticket, where there is one to send. Monotonic times.

    `bounded`: how many updates were scaled down. Of a masked sum, `failure`: why it could not be had, if so; `liars`:
    how many helped to unmask it with shares that they had not been dealt.
    """

    work: Work
    answers: tuple[tuple[Ticket, Tensor | None], ...] = ()
    began: float = 0.0
    ended: float = 0.0
    bounded: int = 0
    failure: AggregationError | None = None
    liars: int = 0


class Engine:
    """Works from `start()` to `stop()`; `wake` is called after each outcome, from the compute thread.

    `threads`: how many it computes with; None leaves torch's choice. `replicas`: with whom rounds are averaged.
    """

    def __init__(
        self,
        progress: Progress,
        wake: Callable[[], None],
        threads: int | None = None,
        replicas: Replicas | None = None,
    ) -> None:
        self.progress = progress
        self.wake = wake
        self.threads = threads
        self.replicas = replicas
        self.caches = StreamCaches()
        self.works: queue.Queue[Work | None] = queue.Queue(QUEUE_LENGTH)
        self.outcomes: queue.SimpleQueue[Computed | Exception] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="compute", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def submit(self, work: Work) -> None:
        """Never fills the queue: under way are 16 cohorts (cohort.in_flight) at most, an undone round, an inference."""
        self.works.put_nowait(work)

    def collect(self) -> list[Computed]:
        """All outcomes so far. Raises what the compute thread raised."""
        collected: list[Computed] = []
        while not self.outcomes.empty():
            outcome = self.outcomes.get_nowait()
            if isinstance(outcome, Exception):
                raise outcome
            collected.append(outcome)
        return collected

    def stop(self, timeout_s: float) -> None:
        """Finish the work at hand and end the thread."""
        self.works.put(None, timeout=timeout_s)
        self.thread.join(timeout_s)

    def _run(self) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        try:
            while (work := self.works.get()) is not None:
                began = time.monotonic()
                outcome = self._do(work)
                self.outcomes.put(replace(outcome, began=began, ended=time.monotonic()))
                self.wake()
        except Exception as error:  # noqa: BLE001 - carried to the owner by collect(), which raises it
            self.outcomes.put(error)
            self.wake()

    def _do(self, work: Work) -> Computed:
        match work:
            case RunForward(cohort, tickets):
                return _answered(work, tickets, self._trunk.forward(cohort, [ticket.payload for ticket in tickets]))
            case RunEvaluation(tickets):
                return _answered(work, tickets, self._trunk.evaluate([ticket.payload for ticket in tickets]))
            case RunGeneration(tickets):
                rows = [ticket.payload for ticket in tickets]
                caches = [
                    self.caches.of(t.session, t.stream, len(r.lengths)) for t, r in zip(tickets, rows, strict=True)
                ]
                return _answered(work, tickets, self._trunk.generate(rows, caches))
            case ReleaseStreams(streams):
                self.caches.release(streams)
                return Computed(work)
            case RunBackward(cohort, forwards, gradients, steps, last):
                present = [gradients.get(forward.session) for forward in forwards]
                payloads = [None if ticket is None else ticket.payload for ticket in present]
                results = self._trunk.backward(cohort, payloads, last=last)
                if steps is not None:
                    self._trunk.step(steps)
                pairs = zip(present, results, strict=True)
                return Computed(work, tuple((ticket, result) for ticket, result in pairs if ticket is not None))
            case Aggregate(round_, updates, clients, sum_):
                self.progress.clients = clients
                if sum_ is not None:
                    return self._unmask(work, round_, sum_)
                return Computed(work, bounded=self._end_round(round_, updates, None))
            case Restore(round_):
                self.progress.restore(round_)
                return Computed(work)
            case _:
                assert_never(work)

    @property
    def _trunk(self) -> Trunk:
        """For works that only come where the server has one."""
        assert isinstance(self.progress.trunk, Trunk)
        return self.progress.trunk

    def _unmask(self, work: Work, round: int, sum_: AnySum) -> Computed:
        """The end of a round whose updates are masked. Without a sum all go on from where they began.

        Under a group's key it comes twice: the sum is for a client to open first, and the round goes on meanwhile.
        """
        try:
            summed = sum_.finish()
        except AggregationError as error:
            self._end_round(round, (), None)
            return Computed(work, failure=error)
        if summed is None:
            return Computed(work)
        if summed.liars:
            event(logger, "wrong_shares", level=logging.WARNING, clients=",".join(summed.liars), round=round)
        self._end_round(round, (), summed)
        return Computed(work, liars=len(summed.liars))

    def _end_round(self, round: int, tickets: Sequence[Ticket], summed: Summed | None) -> int:
        """Heads, tails and per-client adapters aggregated, replicas' trunks averaged; then a checkpoint.

        How many updates were scaled down.
        """
        progress, trunk = self.progress, self.progress.trunk
        heads_and_tails = progress.start()
        start = {**heads_and_tails, **trunk.own_start()}
        updates = [self._update(ticket) for ticket in tickets]
        weight = sum(update.weight for update in updates)
        if summed is not None:
            weight = summed.weight
            if trunk.own_start():
                updates = [Update(c, summed.weights[c], trunk.own_values(c)) for c in summed.contributors]
        if self.replicas is not None:
            self.replicas.announce_end(round)
        result = aggregate(progress.job, start, updates, progress.aggregator, self.replicas, summed)
        trunk.end_round({name: value for name, value in result.values.items() if name not in heads_and_tails})
        if self.replicas is not None:
            trunk.take_round_values(self.replicas.mean(trunk.round_values(), weight))
        trunk.take_residuals(result.state)
        contributors = [update.client for update in updates] if summed is None else summed.contributors
        counted = () if result.values is start else contributors
        averages = {name: result.values[name] for name in heads_and_tails}
        told = tell(progress.job.wire, heads_and_tails, averages, progress.unsent)
        box = None if summed is None else summed.box
        progress.complete_round(told.values, result.state, counted, told.unsent, told.change, box)
        if self.replicas is not None and isinstance(progress.job.privacy, CentralPrivacy):
            # Nobody is told before all have kept it: a round begun again gets other noise, and would be paid for twice.
            self.replicas.total(1)
        return result.bounded

    def _update(self, ticket: Ticket) -> Update:
        """What the client handed in, values, differences or gradients, and what its own adapter here has become."""
        own, job = self.progress.trunk.own_values(ticket.client), self.progress.job
        if job.wire.compresses_updates or job.exchanges_gradients:
            return Update(ticket.client, ticket.weight, own, changes=ticket.payload)
        return Update(ticket.client, ticket.weight, {**ticket.payload, **own})


def _answered(work: Work, tickets: tuple[Ticket, ...], outputs: list[Tensor]) -> Computed:
    return Computed(work, tuple(zip(tickets, outputs, strict=True)))
