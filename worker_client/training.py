"""The client's training loop: rounds of local steps with the remote trunk, updates and averages between them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.error_feedback import Compressed, compress, decompress
from shared.errors import Refused, SchemaError, TensorError
from shared.job import Job, Wire
from shared.model.trainable import load_trained
from shared.secure_aggregation.terms import SumTerms
from worker_client.batches import pack_rows
from worker_client.carried import Carried
from worker_client.data import Row
from worker_client.drift import begin, next_control
from worker_client.group import Group
from worker_client.head_tail import NO_SCORE, HeadTail, Score
from worker_client.masking import MaskedUpdates, Roster
from worker_client.privacy.protection import Protection
from worker_client.progress import Progress
from worker_client.remote_trunk import Boundary, RemoteTrunk
from worker_client.steps import Report, Steps

# What a server says to one whom the others have not waited for.
LEFT_BEHIND = ("not_in_round", "wrong_step")


@dataclass
class Training:
    """One client's run. `report` gets an event a step, an evaluation and a round: plain data, never text or tokens.

    `roster`: whom this client's owner knows to be a client of the job; None for whomever the server names.
    `protection`: of a job with privacy, whose updates leave through it and not otherwise. `group`: of a job with a
    group's key, without which nothing is masked or read.
    """

    job: Job
    parts: HeadTail
    trunk: RemoteTrunk
    rows: Sequence[Row]
    validation: Sequence[Row]
    out: Path
    report: Report
    roster: Roster | None = None
    protection: Protection | None = None
    group: Group | None = None
    progress: Progress = field(init=False)
    start: Mapping[str, Tensor] = field(init=False, default_factory=dict)
    """What round `started` began with, of what is handed in, if the job needs it: the one copy, changed by nobody."""
    started: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        assert (self.protection is None) == (self.job.privacy.type == "none")
        assert (self.group is None) == (self.job.aggregation.group_key is None)
        self.progress = Progress(self.job, self.parts, self.out, self.report)

    def run(self) -> Score | None:
        """Train until the job is finished; the joint model's score on the validation rows, if there are any."""
        self.progress.resume()
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parts.shared.items()}
        identity = self.trunk.link.identity
        masked = MaskedUpdates(self.job, identity, shapes, self.out, self.report, self.roster, self.group)
        if self.protection is not None:
            self.protection.resume(self.progress.completed)
        boundary = self.trunk.join(len(self.rows))
        score: Score | None = None
        while (round := boundary.round) is not None:
            began = time.monotonic()
            terms = masked.terms(boundary)
            self.progress.align(round)
            self.progress.settle(boundary)
            self._apply(boundary)
            spent = {} if self.protection is None else self.protection.so_far()
            self.report({"event": "round", "round": round, "members": boundary.members, **spent})
            if self.protection is not None:
                self.protection.begin(self.progress.handed_in(round))
            if round % self.job.rounds.evaluate_every == 0:
                score = self._evaluate(round)
            try:
                boundary = self._take_part(round, boundary, masked, terms)
            except Refused as error:
                if error.reason not in LEFT_BEHIND:
                    raise
                boundary = self._left_behind(round, error)
            else:
                done = {"round": round, "of": self.job.rounds.count, "seconds": time.monotonic() - began}
                self.report({"event": "round_done", **done})
        self._apply(boundary)
        score = self._evaluate(self.job.rounds.count)
        self.report({"event": "finished", "rounds": self.job.rounds.count})
        return score

    def _take_part(self, round: int, boundary: Boundary, masked: MaskedUpdates, terms: SumTerms | None) -> Boundary:
        """Train a round and hand in what came of it; where the next begins."""
        self._forget_gradients()
        drift = begin(self.job, self.start, boundary.control, self.progress.carried.control)
        steps = Steps(self.job, self.parts, self.trunk, self.rows, self.progress.optimizer, self.report, drift)
        weight = self._weight(steps.train_round(round))
        update, start = _values(self.parts.shared), self.start
        if self.job.exchanges_gradients:
            update = _gradients(self.parts.shared)
            start = {name: torch.zeros_like(gradient) for name, gradient in update.items()}
        if self.protection is not None:
            update = self.protection.hand_in(round, self.start, update)
        compressed = self._compressed(update)
        unsent = {} if compressed is None else compressed.unsent
        after = Carried(next_control(self.job, drift, self.parts.shared), unsent)
        self.progress.complete_round(round, after, {} if self.protection is None else self.protection.kept)
        if compressed is not None:
            ended = self.trunk.update_in_part(round, weight, compressed)
        elif terms is not None:
            ended = masked.hand_in(self.trunk, terms, round, weight, start, update)
        else:
            ended = self.trunk.update(round, weight, update)
        if ended.refused is not None:
            self.report({"event": "update_refused", "round": round, "reason": ended.refused})
        return ended

    def _compressed(self, values: Mapping[str, Tensor]) -> Compressed | None:
        """What goes up of what this round changed, if not all values do."""
        wire = self.job.wire
        if not wire.compresses_updates:
            return None
        change = {name: value - self.start[name] for name, value in values.items()}
        return compress(change, self.progress.carried.unsent, wire.update_density, wire.update)

    def _left_behind(self, round: int, error: Refused) -> Boundary:
        """The others went on without this client, or began anew: be as it was when the round began, and join again.

        Whatever it handed in did not count. Raises Refused if the server knows nothing of that: it is a member still.
        """
        self.report({"event": "left_behind", "round": round})
        self.progress.undo(round)
        return replace(self.trunk.join(len(self.rows)), refused=error.message)

    def _weight(self, target_tokens: int) -> int:
        """What this client counts in a round's mean."""
        return {"tokens": target_tokens, "rows": len(self.rows), "clients": 1}[self.job.rounds.weighting]

    def _evaluate(self, rounds: int) -> Score | None:
        """The joint model after so many rounds on the validation rows, in batches of the training size."""
        if not self.validation:
            return None
        began = time.monotonic()
        self.parts.train_mode(False)
        size = self.job.training.per_device_train_batch_size
        score = NO_SCORE
        for start in range(0, len(self.validation), size):
            batch = pack_rows(self.validation[start : start + size], self.job.prompt_tokens)
            with torch.no_grad():
                hidden = self.parts.hidden(batch)
            score += self.parts.score(self.trunk.evaluate(hidden, batch), batch)
        self.report(
            {
                "event": "evaluation",
                "rounds": rounds,
                "loss": score.loss,
                "accuracy": score.accuracy,
                "tokens": score.tokens,
                "rows": score.rows,
                "right_rows": score.right_rows,
                "seconds": time.monotonic() - began,
            }
        )
        return score

    # What the server says, and what of it is kept

    def _forget_gradients(self) -> None:
        """A round that was broken off may have left some."""
        for parameter in self.parts.parameters.values():
            parameter.grad = None

    def _apply(self, boundary: Boundary) -> None:
        """Take over the averages, or add what they differ by: no round goes on from what this client trained alone.

        Raises TensorError if they, control variates or residuals do not fit, SchemaError if there are none, or it is a
        difference to what this client does not hold.
        """
        expected = {name: parameter.shape for name, parameter in self.parts.shared.items()}
        if self.group is not None:
            boundary = self.group.opened(boundary, expected)
        for values in (boundary.averages, boundary.control):
            if values and {name: value.shape for name, value in values.items()} != expected:
                raise TensorError("the server's averages do not fit this client's parts")
        if boundary.pieces and self.started != self.progress.completed - 1:
            raise SchemaError("the server sent a difference to values that this client does not hold")
        if expected and boundary.round != 0 and not (boundary.averages or boundary.pieces):
            # An update that began with this client's own parameters would tell them, without the noise that is due.
            raise SchemaError("the server has no averages to go on from, after rounds that it should have averaged")
        self.parts.residuals.apply(boundary.residuals)
        if boundary.averages:
            load_trained(self.parts.shared, boundary.averages)
        if boundary.pieces:
            load_trained(self.parts.shared, told(self.job.wire, self.start, boundary))
        if self.job.keeps_round_start:
            self.start = {name: value.clone() for name, value in _values(self.parts.shared).items()}
            self.started = boundary.round


def _values(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in parameters.items()}


def _gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.detach() for n, p in parameters.items()}


def told(wire: Wire, start: Mapping[str, Tensor], boundary: Boundary) -> dict[str, Tensor]:
    """What all go on from, where the boundary brings its difference to `start`. Raises TensorError."""
    shapes = {name: value.shape for name, value in start.items()}
    change = decompress(boundary.pieces, boundary.frames, shapes, wire.average_density, wire.average)
    return {name: value + change[name].to(value.device) for name, value in start.items()}
