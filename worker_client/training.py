"""The client's training loop: rounds of local steps with the remote trunk, averages between them, state on disk."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from shared import state_files
from shared.error_feedback import Compressed, compress, decompress
from shared.errors import CheckpointError, SchemaError, TensorError
from shared.job import Job, Wire
from shared.model.optimizer import PartOptimizer
from shared.model.trainable import load_trained
from worker_client.batches import pack_rows
from worker_client.data import Row
from worker_client.drift import begin, next_control
from worker_client.head_tail import NO_SCORE, HeadTail, Score
from worker_client.remote_trunk import Boundary, RemoteTrunk
from worker_client.steps import Report, Steps

# A server killed while it averaged begins its last round anew; one with a corrupt last checkpoint, the round before.
KEPT_CHECKPOINTS = 3


@dataclass
class Training:
    """One client's run. `report` gets an event a step, an evaluation and a round: plain data, never text or tokens."""

    job: Job
    parts: HeadTail
    trunk: RemoteTrunk
    rows: Sequence[Row]
    validation: Sequence[Row]
    out: Path
    report: Report
    optimizer: PartOptimizer = field(init=False)
    completed: int = field(init=False, default=0)
    control: dict[str, Tensor] = field(init=False, default_factory=dict)
    """SCAFFOLD's control variate of this client, c_i, by name; empty before its first round, and without SCAFFOLD."""
    unsent: dict[str, Tensor] = field(init=False, default_factory=dict)
    """What is left of this client's differences, by name; empty where updates travel whole."""
    start: dict[str, Tensor] = field(init=False, default_factory=dict)
    """What round `started` began with, where differences to it travel."""
    started: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.optimizer = self._fresh_optimizer()

    def run(self) -> Score | None:
        """Train until the job is finished; the joint model's score on the validation rows, if there are any."""
        self._resume()
        boundary = self.trunk.join(len(self.rows))
        score: Score | None = None
        while boundary.round is not None:
            self._align(boundary.round)
            self._apply(boundary)
            self.report({"event": "round", "round": boundary.round, "members": boundary.members})
            if boundary.round % self.job.rounds.evaluate_every == 0:
                score = self._evaluate(boundary.round)
            control, unsent = self.control, self.unsent
            weight = self._train_round(boundary)
            self.completed = boundary.round + 1
            difference = self._difference()
            self._save()
            if self.job.rounds.weighting == "rows":
                weight = len(self.rows)
            trained = boundary.round
            boundary = self._hand_in(trained, weight, difference)
            if boundary.refused is not None:
                self.report({"event": "update_refused", "round": trained, "reason": boundary.refused})
                self.control, self.unsent = control, unsent  # the server does not know of this round's
                self._save()
        self._apply(boundary)
        score = self._evaluate(self.job.rounds.count)
        self.report({"event": "finished", "rounds": self.job.rounds.count})
        return score

    def _difference(self) -> Compressed | None:
        """What goes up of what this round changed, if not all values do; the rest is kept."""
        wire = self.job.wire
        if not wire.compresses_updates:
            return None
        change = {name: value - self.start[name] for name, value in self._trained().items()}
        compressed = compress(change, self.unsent, wire.update_density, wire.update)
        self.unsent = compressed.unsent
        return compressed

    def _hand_in(self, round: int, weight: int, difference: Compressed | None) -> Boundary:
        if difference is None:
            return self.trunk.update(round, weight, self._trained())
        return self.trunk.update_in_part(round, weight, difference)

    def _train_round(self, boundary: Boundary) -> int:
        assert boundary.round is not None
        drift = begin(self.job, self.parts.parameters, boundary.control, self.control)
        steps = Steps(self.job, self.parts, self.trunk, self.rows, self.optimizer, self.report, drift)
        weight = steps.train_round(boundary.round)
        self.control = next_control(self.job, drift, self.parts.parameters)
        return weight

    def _evaluate(self, round: int) -> Score | None:
        """The joint model on the validation rows, in batches of the training size."""
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
                "round": round,
                "loss": score.loss,
                "accuracy": score.accuracy,
                "tokens": score.tokens,
                "rows": score.rows,
                "right_rows": score.right_rows,
                "seconds": time.monotonic() - began,
            }
        )
        return score

    # State

    def _fresh_optimizer(self) -> PartOptimizer:
        return PartOptimizer(self.parts.parameters, self.job.training, self.job.total_steps)

    def _trained(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parts.parameters.items()}

    def _apply(self, boundary: Boundary) -> None:
        """Take over the averages, or add what they differ by. Raises TensorError if they, control variates or residuals
        do not fit, SchemaError if it is a difference to what this client does not hold.
        """
        expected = {name: parameter.shape for name, parameter in self.parts.parameters.items()}
        for values in (boundary.averages, boundary.control):
            if values and {name: value.shape for name, value in values.items()} != expected:
                raise TensorError("the server's averages do not fit this client's parts")
        if boundary.pieces and self.started != self.completed - 1:
            raise SchemaError("the server sent a difference to values that this client does not hold")
        self.parts.residuals.apply(boundary.residuals)
        if boundary.averages:
            load_trained(self.parts.parameters, boundary.averages)
        if boundary.pieces:
            load_trained(self.parts.parameters, after(self.job.wire, self.start, boundary))
        if self.job.wire.compresses_updates or self.job.wire.compresses_averages:
            self.start = {name: value.clone() for name, value in self._trained().items()}
            self.started = boundary.round

    def _resume(self) -> None:
        """Continue from the newest readable checkpoint in `out`, or begin with `checkpoint-0`.

        Raises CheckpointError if there are some and none is readable, or they are another job's.
        """
        if not state_files.resume(self.out, self._load, self._say_unreadable):
            self._save()

    def _align(self, round: int) -> None:
        """Be where the server is: at the state after `round` rounds of local steps."""
        if round == self.completed:
            return
        if round in state_files.numbers(self.out):
            try:
                self._load(round)
            except CheckpointError as error:
                self._say_unreadable(round, error)
            else:
                return
        if round == 0 and self.job.wire.compresses_averages:
            raise CheckpointError(
                f"{self.out}: this client completed {self.completed} rounds, and the server begins with the first",
                hint="give --out another folder",
            )
        # The averages still come from the server; this client's optimizer continues from where it was.
        self.report({"event": "rounds_missed", "completed": self.completed, "round": round})
        self.completed = round

    def _load(self, number: int) -> None:
        tensors, facts = state_files.load(self.out, number)
        if facts.get("job") != self.job.digest().hex():
            raise CheckpointError(f"{self.out}: holds checkpoints of another job", hint="give --out another folder")
        load_trained(self.parts.parameters, _under("trained/", tensors))
        self.optimizer = self._fresh_optimizer()
        self.optimizer.load_state(_under("optimizer/", tensors), float(facts["steps"]))
        torch.set_rng_state(tensors["random/torch"])
        self.control = _under("control/", tensors)
        self.unsent = _under("unsent/", tensors)
        self.completed = number
        self.report({"event": "resumed", "round": number})

    def _say_unreadable(self, number: int, error: CheckpointError) -> None:
        self.report({"event": "checkpoint_unreadable", "number": number, "reason": error.message})

    def _save(self) -> None:
        tensors = {f"trained/{name}": value for name, value in self._trained().items()}
        tensors |= {f"optimizer/{name}": value for name, value in self.optimizer.state().items()}
        tensors |= {f"control/{name}": value for name, value in self.control.items()}
        tensors |= {f"unsent/{name}": value for name, value in self.unsent.items()}
        tensors["random/torch"] = torch.get_rng_state()
        facts = {"job": self.job.digest().hex(), "steps": self.optimizer.steps}
        state_files.save(self.out, self.completed, tensors, facts, keep=KEPT_CHECKPOINTS)


def after(wire: Wire, start: Mapping[str, Tensor], boundary: Boundary) -> dict[str, Tensor]:
    """What all go on from, where the boundary brings its difference to `start`. Raises TensorError."""
    shapes = {name: value.shape for name, value in start.items()}
    change = decompress(boundary.pieces, boundary.frames, shapes, wire.average_density, wire.average)
    return {name: value + change[name].to(value.device) for name, value in start.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
