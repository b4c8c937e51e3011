"""The compute thread: the one owner of the trunk. Work in, outcomes out, in order.

It knows no sockets and no sessions. An error in it is kept and raised to whoever collects the outcomes.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

import torch
from torch import Tensor

from worker_server.aggregators.method import Update
from worker_server.progress import Progress
from worker_server.replicas import Replicas
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


@dataclass(frozen=True)
class Computed:
    """The outcome of `work`: a tensor for each ticket, where there is one to send. Monotonic times.

    `bounded`: how many updates were scaled down.
    """

    work: Work
    answers: tuple[tuple[Ticket, Tensor | None], ...] = ()
    began: float = 0.0
    ended: float = 0.0
    bounded: int = 0


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
            case Aggregate(round_, updates):
                return Computed(work, bounded=self._end_round(round_, updates))
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

    def _end_round(self, round: int, tickets: Sequence[Ticket]) -> int:
        """Heads, tails and per-client adapters aggregated, replicas' trunks averaged; then a checkpoint.

        How many updates were scaled down.
        """
        progress, trunk = self.progress, self.progress.trunk
        heads_and_tails = progress.start()
        start = {**heads_and_tails, **trunk.own_start()}
        updates = [self._update(ticket) for ticket in tickets]
        if self.replicas is not None:
            self.replicas.announce_end(round)
        result = aggregate(progress.job, start, updates, progress.aggregator, self.replicas)
        trunk.end_round({name: value for name, value in result.values.items() if name not in heads_and_tails})
        if self.replicas is not None:
            weight = sum(ticket.weight for ticket in tickets)
            trunk.take_round_values(self.replicas.mean(trunk.round_values(), weight))
        trunk.take_residuals(result.state)
        averages = {name: result.values[name] for name in heads_and_tails}
        told = tell(progress.job.wire, heads_and_tails, averages, progress.unsent)
        progress.complete_round(told.values, result.state, told.unsent, told.change)
        return result.bounded

    def _update(self, ticket: Ticket) -> Update:
        """What the client handed in, values or differences, and what its own adapter here has become."""
        own = self.progress.trunk.own_values(ticket.client)
        if self.progress.job.wire.compresses_updates:
            return Update(ticket.client, ticket.weight, own, changes=ticket.payload)
        return Update(ticket.client, ticket.weight, {**ticket.payload, **own})


def _answered(work: Work, tickets: tuple[Ticket, ...], outputs: list[Tensor]) -> Computed:
    return Computed(work, tuple(zip(tickets, outputs, strict=True)))
