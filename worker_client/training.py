"""The client's training loop: rounds of local steps with the remote trunk, averages between them, state on disk."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from shared import state_files
from shared.error_feedback import Compressed, compress, decompress
from shared.errors import CheckpointError, Refused, SchemaError, TensorError
from shared.job import CentralPrivacy, Job, Wire
from shared.model.optimizer import PartOptimizer
from shared.model.trainable import load_trained
from shared.secure_aggregation.terms import SumTerms
from worker_client.batches import pack_rows
from worker_client.carried import Carried, carried_in
from worker_client.data import Row
from worker_client.drift import begin, next_control
from worker_client.group import Group
from worker_client.head_tail import NO_SCORE, HeadTail, Score
from worker_client.masking import MaskedUpdates, Roster
from worker_client.privacy.protection import Protection
from worker_client.remote_trunk import Boundary, RemoteTrunk
from worker_client.steps import Report, Steps

# A server killed while it averaged begins its last round anew; one with a corrupt last checkpoint, the round before.
KEPT_CHECKPOINTS = 3
# What a server says to one whom the others have not waited for.
LEFT_BEHIND = ("not_in_round", "wrong_step")
# The difference that was handed in for the round before, in a job with privacy: this, then the tensor's name.
HANDED_IN = "handed_in/"
# What is carried on if the update counts: this, then as what was carried before.
AFTER = "after/"


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
    optimizer: PartOptimizer = field(init=False)
    completed: int = field(init=False, default=0)
    carried: Carried = field(init=False, default=Carried())
    after: Carried | None = field(init=False, default=None)
    """What is carried on if the update of the round trained last counts."""
    trained: int = field(init=False, default=0)
    """How many rounds are complete with that one."""
    start: dict[str, Tensor] = field(init=False, default_factory=dict)
    """What round `started` began with, of what is handed in, where differences to it are."""
    started: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        assert (self.protection is None) == (self.job.privacy.type == "none")
        assert (self.group is None) == (self.job.aggregation.group_key is None)
        self.optimizer = self._fresh_optimizer()

    def run(self) -> Score | None:
        """Train until the job is finished; the joint model's score on the validation rows, if there are any."""
        self._resume()
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parts.shared.items()}
        identity = self.trunk.link.identity
        masked = MaskedUpdates(self.job, identity, shapes, self.out, self.report, self.roster, self.group)
        if self.protection is not None:
            self.protection.resume(self.completed)
        boundary = self.trunk.join(len(self.rows))
        score: Score | None = None
        while (round := boundary.round) is not None:
            terms = masked.terms(boundary)
            self._align(round)
            self._settle(boundary)
            self._apply(boundary)
            spent = {} if self.protection is None else self.protection.so_far()
            self.report({"event": "round", "round": round, "members": boundary.members, **spent})
            if self.protection is not None:
                self.protection.begin(self._handed_in(round), self.parts.shared)
            if round % self.job.rounds.evaluate_every == 0:
                score = self._evaluate(round)
            try:
                boundary = self._take_part(round, boundary, masked, terms)
            except Refused as error:
                if error.reason not in LEFT_BEHIND:
                    raise
                boundary = self._left_behind(round)
        self._apply(boundary)
        score = self._evaluate(self.job.rounds.count)
        self.report({"event": "finished", "rounds": self.job.rounds.count})
        return score

    def _take_part(self, round: int, boundary: Boundary, masked: MaskedUpdates, terms: SumTerms | None) -> Boundary:
        """Train a round and hand in what came of it; where the next begins."""
        self._forget_gradients()
        drift = begin(self.job, self.parts.shared, boundary.control, self.carried.control)
        steps = Steps(self.job, self.parts, self.trunk, self.rows, self.optimizer, self.report, drift)
        weight = self._weight(steps.train_round(round))
        update, start = _values(self.parts.shared), self.start
        if self.job.exchanges_gradients:
            update = _gradients(self.parts.shared)
            start = {name: torch.zeros_like(gradient) for name, gradient in update.items()}
        if self.protection is not None:
            update = self.protection.hand_in(round, update)
        compressed = self._compressed(update)
        unsent = {} if compressed is None else compressed.unsent
        after = Carried(next_control(self.job, drift, self.parts.shared), unsent)
        self.after = after if after.finite else None
        self.completed = self.trained = round + 1
        self._save()
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
        return compress(change, self.carried.unsent, wire.update_density, wire.update)

    def _left_behind(self, round: int) -> Boundary:
        """The others went on without this client, or began anew: be as it was when the round began, and join again.

        Raises Refused if the server knows nothing of that: it is a member still.
        """
        self.report({"event": "left_behind", "round": round})
        self._go_back(round, moved=True)
        return self.trunk.join(len(self.rows))

    def _weight(self, target_tokens: int) -> int:
        """What this client counts in a round's mean."""
        return {"tokens": target_tokens, "rows": len(self.rows), "clients": 1}[self.job.rounds.weighting]

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
        """Of all parameters that this client's own steps change."""
        own = self.parts.parameters
        if self.job.exchanges_gradients:
            own = {name: parameter for name, parameter in own.items() if name not in self.parts.shared}
        return PartOptimizer(own, self.job.training, self.job.total_steps)

    def _forget_gradients(self) -> None:
        """A round that was broken off may have left some."""
        for parameter in self.parts.parameters.values():
            parameter.grad = None

    def _apply(self, boundary: Boundary) -> None:
        """Take over the averages, or add what they differ by. Raises TensorError if they, control variates or residuals
        do not fit, SchemaError if it is a difference to what this client does not hold.
        """
        expected = {name: parameter.shape for name, parameter in self.parts.shared.items()}
        if self.group is not None:
            boundary = self.group.opened(boundary, expected)
        for values in (boundary.averages, boundary.control):
            if values and {name: value.shape for name, value in values.items()} != expected:
                raise TensorError("the server's averages do not fit this client's parts")
        if boundary.pieces and self.started != self.completed - 1:
            raise SchemaError("the server sent a difference to values that this client does not hold")
        self.parts.residuals.apply(boundary.residuals)
        if boundary.averages:
            load_trained(self.parts.shared, boundary.averages)
        if boundary.pieces:
            load_trained(self.parts.shared, told(self.job.wire, self.start, boundary))
        wire = self.job.wire
        if wire.compresses_updates or wire.compresses_averages or self.job.secure != "off":
            self.start = {name: value.clone() for name, value in _values(self.parts.shared).items()}
            self.started = boundary.round

    def _resume(self) -> None:
        """Continue from the newest readable checkpoint in `out`, or begin with `checkpoint-0`.

        Raises CheckpointError if there are some and none is readable, or they are another job's.
        """
        if not state_files.resume(self.out, self._load, self._say_unreadable):
            self._save()

    def _align(self, round: int) -> None:
        """Be where the server is: as this client was when it last took part before `round`, there in the schedule.

        Averages come from the server. Not to be drawn is as it should be; what was missed otherwise is said.
        """
        if round != self.completed:
            self._go_back(round)
        if round == 0 and self.completed and self.job.wire.compresses_averages:
            raise CheckpointError(
                f"{self.out}: this client completed {self.completed} rounds, and the server begins with the first",
                hint="give --out another folder",
            )
        if round != self.completed and self.job.cohort.sampled is None:
            self.report({"event": "rounds_missed", "completed": self.completed, "round": round})
        self.completed = round
        self.optimizer.move_to(round * self.job.rounds.local_steps)

    def _go_back(self, round: int, *, moved: bool = False) -> None:
        """To the newest checkpoint that is not after `round`, if there is one and it is not where this client is.

        `moved`: it has trained since `completed`.
        """
        for number in reversed([number for number in state_files.numbers(self.out) if number <= round]):
            if number == self.completed and not moved:
                return
            try:
                self._load(number)
            except CheckpointError as error:
                self._say_unreadable(number, error)
            else:
                return

    def _settle(self, boundary: Boundary) -> None:
        """Carry on what came of the round trained last, if its update counted."""
        counted = boundary.refused is None if boundary.counted is None else boundary.counted == self.trained
        if counted and self.after is not None:
            self.carried = self.after
        self.after = None

    def _load(self, number: int) -> None:
        tensors, facts = state_files.load(self.out, number)
        if facts.get("job") != self.job.digest().hex():
            raise CheckpointError(f"{self.out}: holds checkpoints of another job", hint="give --out another folder")
        load_trained(self.parts.parameters, _under("trained/", tensors))
        self.optimizer = self._fresh_optimizer()
        self.optimizer.load_state(_under("optimizer/", tensors), float(facts["steps"]))
        torch.set_rng_state(tensors["random/torch"])
        self.carried = carried_in(tensors)
        self.after = carried_in(tensors, AFTER) if facts.get("carries_on") else None
        self.completed = self.trained = number
        self.report({"event": "resumed", "round": number})

    def _handed_in(self, round: int) -> dict[str, Tensor]:
        """What was kept of this job's update of `round`, if it was made before.

        Nothing where central noise was seen on it: a server that asks again will draw other noise.
        """
        numbers = state_files.numbers(self.out)
        seen = isinstance(self.job.privacy, CentralPrivacy) and max(numbers, default=0) > round + 1
        if round + 1 not in numbers or seen:
            return {}
        try:
            tensors, facts = state_files.load(self.out, round + 1)
        except CheckpointError as error:
            self._say_unreadable(round + 1, error)
            return {}
        return _under(HANDED_IN, tensors) if facts.get("job") == self.job.digest().hex() else {}

    def _say_unreadable(self, number: int, error: CheckpointError) -> None:
        self.report({"event": "checkpoint_unreadable", "number": number, "reason": error.message})

    def _save(self) -> None:
        tensors = {f"trained/{name}": value for name, value in _values(self.parts.parameters).items()}
        tensors |= {f"optimizer/{name}": value for name, value in self.optimizer.state().items()}
        tensors |= self.carried.tensors() | ({} if self.after is None else self.after.tensors(AFTER))
        if self.protection is not None:
            tensors |= {HANDED_IN + name: value for name, value in self.protection.kept.items()}
        tensors["random/torch"] = torch.get_rng_state()
        carries_on = self.after is not None
        facts = {"job": self.job.digest().hex(), "steps": self.optimizer.steps, "carries_on": carries_on}
        state_files.save(self.out, self.completed, tensors, facts, keep=KEPT_CHECKPOINTS)


def _values(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in parameters.items()}


def _gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.detach() for n, p in parameters.items()}


def told(wire: Wire, start: Mapping[str, Tensor], boundary: Boundary) -> dict[str, Tensor]:
    """What all go on from, where the boundary brings its difference to `start`. Raises TensorError."""
    shapes = {name: value.shape for name, value in start.items()}
    change = decompress(boundary.pieces, boundary.frames, shapes, wire.average_density, wire.average)
    return {name: value + change[name].to(value.device) for name, value in start.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
