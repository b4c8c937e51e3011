"""A round's local steps: batches through head, remote trunk and tail, gradients back, the client's own optimizer.

In lockstep the batches of one step are under way together, and the optimizer steps after the last: nothing changes in
between. In greedy mode every batch is a step, and steps overlap: the head's backward uses the parameters that its
forward used, while the optimizer moves on.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.errors import TensorError
from shared.job import Job
from shared.logs import event
from shared.model.optimizer import PartOptimizer
from worker_client.batches import Batch, batch_indices, pack_rows
from worker_client.data import Row
from worker_client.drift import Drift
from worker_client.head_tail import HeadTail
from worker_client.pipeline import schedule
from worker_client.remote_trunk import Pending, RemoteTrunk

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]


@dataclass
class Underway:
    """A batch between its sending and its finish. `share`: its part of the target tokens of its step."""

    step: int
    micro_batch: int
    batch: Batch
    share: float
    hidden: Tensor
    forward: Pending
    version: Mapping[str, Tensor] | None
    began: float
    waited_s: float = 0.0
    loss: float = 0.0
    backward: Pending | None = None
    gradients: dict[str, Tensor] | None = None


@dataclass
class Steps:
    job: Job
    parts: HeadTail
    trunk: RemoteTrunk
    rows: Sequence[Row]
    optimizer: PartOptimizer
    report: Report
    drift: Drift

    def train_round(self, round: int) -> int:
        """All local steps of `round`; the number of target tokens trained on."""
        steps = self.job.rounds.local_steps
        if self.job.cohort.mode == "greedy":
            return self._overlapping(round, range(steps))
        return sum(self._overlapping(round, [step]) for step in range(steps))

    def _overlapping(self, round: int, steps: Sequence[int]) -> int:
        """These steps' batches, several under way."""
        overlapping = self.job.cohort.mode == "greedy"
        batches = [self._batches(round, step) for step in steps]
        flat = [
            (step, micro_batch, batch, sum(b.target_tokens for b in of_step))
            for step, of_step in zip(steps, batches, strict=True)
            for micro_batch, batch in enumerate(of_step)
        ]
        underway: dict[int, Underway] = {}
        began = time.monotonic()
        self.parts.train_mode(True)
        for action, index in schedule(len(flat), self.job.cohort.in_flight):
            match action:
                case "send":
                    underway[index] = self._send(round, *flat[index], overlapping)
                case "turn":
                    self._turn(underway[index], overlapping)
                case "finish":
                    self._finish(underway[index])
                    if overlapping:
                        self._end_step(round, [underway.pop(index)], began)
                        began = time.monotonic()
        if not overlapping:
            self._end_step(round, list(underway.values()), began)
        return sum(batch.target_tokens for _, _, batch, _ in flat)

    def _batches(self, round: int, step: int) -> list[Batch]:
        training = self.job.training
        count = training.gradient_accumulation_steps
        first = (round * self.job.rounds.local_steps + step) * count
        size, seed = training.per_device_train_batch_size, training.seed
        return [
            pack_rows(
                [self.rows[row] for row in batch_indices(len(self.rows), size, number, seed)], self.job.prompt_tokens
            )
            for number in range(first, first + count)
        ]

    def _send(
        self, round: int, step: int, micro_batch: int, batch: Batch, target_tokens: int, overlapping: bool
    ) -> Underway:
        began = time.monotonic()
        wants_gradient = self.parts.head_is_trained
        version = self.parts.version() if overlapping and wants_gradient else None
        hidden = self.parts.hidden(batch, version)
        forward = self.trunk.send_forward(
            hidden,
            batch,
            round=round,
            step=step,
            micro_batch=micro_batch,
            target_tokens=target_tokens,
            wants_gradient=wants_gradient,
        )
        share = batch.target_tokens / target_tokens if target_tokens else 0.0
        return Underway(step, micro_batch, batch, share, hidden, forward, version, began)

    def _turn(self, underway: Underway, overlapping: bool) -> None:
        """Loss and gradient from the trunk's output."""
        asked = time.monotonic()
        output = self.trunk.hidden(underway.forward).requires_grad_()
        underway.waited_s += time.monotonic() - asked
        loss = self.parts.loss(output, underway.batch)
        torch.autograd.backward(loss * underway.share)
        assert output.grad is not None
        underway.loss = float(loss.detach())
        underway.backward = self.trunk.send_backward(underway.forward.request, output.grad)
        if overlapping:  # other steps' optimizer comes first: these gradients wait until it is their turn
            underway.gradients = {n: p.grad for n, p in self.parts.parameters.items() if p.grad is not None}
            for parameter in self.parts.parameters.values():
                parameter.grad = None

    def _finish(self, underway: Underway) -> None:
        """The head's backward."""
        assert underway.backward is not None
        asked = time.monotonic()
        gradient = self.trunk.gradient(underway.backward)
        underway.waited_s += time.monotonic() - asked
        for name, waiting in (underway.gradients or {}).items():
            self.parts.parameters[name].grad = waiting
        if self.parts.head_is_trained:
            if gradient is None:
                raise TensorError("the server returned no gradient for the head")
            torch.autograd.backward(underway.hidden, gradient)
            if underway.version is not None:
                self.parts.take(underway.version)

    def _end_step(self, round: int, batches: Sequence[Underway], began: float) -> None:
        self.drift.correct(self.parts.shared)
        self.optimizer.step()
        done = {
            "step": round * self.job.rounds.local_steps + batches[0].step,
            "round": round,
            "loss": sum(underway.loss * underway.share for underway in batches),
            "tokens": sum(underway.batch.tokens for underway in batches),
            "seconds": time.monotonic() - began,
            "waited_s": sum(underway.waited_s for underway in batches),
        }
        event(logger, "step_done", level=logging.DEBUG, **done)
        self.report({"event": "step"} | done)
