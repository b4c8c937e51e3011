"""Where a client stands between rounds, in memory and on disk: its parameters, optimizer, random state, what it carries
on, and the update that it handed in.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from shared import state_files
from shared.errors import CheckpointError
from shared.job import CentralPrivacy, Job
from shared.model.optimizer import PartOptimizer
from shared.model.trainable import load_trained
from shared.prefixes import under
from worker_client.carried import Carried, carried_in
from worker_client.head_tail import HeadTail
from worker_client.remote_trunk import Boundary
from worker_client.steps import Report

# A server killed while it averaged begins its last round anew; one with a corrupt last checkpoint, the round before;
# and one that lost everything the job, so that `checkpoint-0` stays too.
KEPT_CHECKPOINTS = 3
# The difference that was handed in for the round before, in a job with privacy: this, then the tensor's name.
HANDED_IN = "handed_in/"
# What is carried on if the update counts: this, then as what was carried before.
AFTER = "after/"


@dataclass
class Progress:
    """`completed`: of how many rounds this is the state. `trained`: how many were complete with the last it trained;
    `after`: what is carried on if that one's update counts.
    """

    job: Job
    parts: HeadTail
    out: Path
    report: Report
    optimizer: PartOptimizer = field(init=False)
    completed: int = field(init=False, default=0)
    trained: int = field(init=False, default=0)
    carried: Carried = field(init=False, default=Carried())
    after: Carried | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.optimizer = self._fresh_optimizer()

    def resume(self) -> None:
        """Continue from the newest readable checkpoint in `out`, or begin with `checkpoint-0`.

        Raises CheckpointError if there are some and none is readable, or they are another job's.
        """
        if not state_files.resume(self.out, self._load, self._say_unreadable):
            self._save({})

    def align(self, round: int) -> None:
        """Be where the server is: as this client was when it last took part before `round`, there in the schedule.

        Averages come from the server, but for the first round: what that begins with is in `checkpoint-0`. Not to be
        drawn is as it should be; what was missed otherwise is said. Raises CheckpointError where this client cannot
        begin anew.
        """
        if round != self.completed:
            self._go_back(round)
        if round == 0 and self.completed:
            raise CheckpointError(
                f"{self.out}: the server begins with the first round, and checkpoint-0 is not there to begin with",
                hint="give --out another folder",
            )
        if round != self.completed and self.job.cohort.sampled is None:
            self.report({"event": "rounds_missed", "completed": self.completed, "round": round})
        self.completed = round
        self.optimizer.move_to(round * self.job.rounds.local_steps)

    def undo(self, round: int) -> None:
        """Be as this client was when `round` began. What came of the rounds before, it has heard.

        Raises CheckpointError if it cannot go back.
        """
        carried = self.carried
        if not self._go_back(round, moved=True):
            raise CheckpointError(
                f"{self.out}: no checkpoint of what round {round + 1} began with can be read",
                hint="give --out another folder",
            )
        self.carried, self.after = carried, None

    def _go_back(self, round: int, *, moved: bool = False) -> bool:
        """To the newest checkpoint that is not after `round`; False if there is none that can be read.

        `moved`: this client has trained since `completed`, so that being there is not enough.
        """
        for number in reversed([number for number in state_files.numbers(self.out) if number <= round]):
            if number == self.completed and not moved:
                return True
            try:
                self._load(number)
            except CheckpointError as error:
                self._say_unreadable(number, error)
            else:
                return True
        return False

    def settle(self, boundary: Boundary) -> None:
        """Carry on what came of the round trained last, if its update counted."""
        counted = boundary.refused is None if boundary.counted is None else boundary.counted == self.trained
        if counted and self.after is not None:
            self.carried = self.after
        self.after = None

    def complete_round(self, round: int, after: Carried, handed_in: Mapping[str, Tensor]) -> None:
        """Its steps are done, and on disk before anything leaves. `handed_in`: the update, where it is kept."""
        self.after = after if after.finite else None
        self.completed = self.trained = round + 1
        self._save(handed_in)

    def handed_in(self, round: int) -> dict[str, Tensor]:
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
        return under(HANDED_IN, tensors) if facts.get("job") == self.job.digest().hex() else {}

    def _fresh_optimizer(self) -> PartOptimizer:
        """Of all parameters that this client's own steps change."""
        own = self.parts.parameters
        if self.job.exchanges_gradients:
            own = {name: parameter for name, parameter in own.items() if name not in self.parts.shared}
        return PartOptimizer(own, self.job.training, self.job.total_steps)

    def _load(self, number: int) -> None:
        tensors, facts = state_files.load(self.out, number)
        if facts.get("job") != self.job.digest().hex():
            raise CheckpointError(f"{self.out}: holds checkpoints of another job", hint="give --out another folder")
        load_trained(self.parts.parameters, under("trained/", tensors))
        self.optimizer = self._fresh_optimizer()
        self.optimizer.load_state(under("optimizer/", tensors), float(facts["steps"]))
        torch.set_rng_state(tensors["random/torch"])
        self.carried = carried_in(tensors)
        self.after = carried_in(tensors, AFTER) if facts.get("carries_on") else None
        self.completed = self.trained = number
        self.report({"event": "resumed", "rounds": number})

    def _save(self, handed_in: Mapping[str, Tensor]) -> None:
        tensors = {f"trained/{name}": parameter.detach() for name, parameter in self.parts.parameters.items()}
        tensors |= {f"optimizer/{name}": value for name, value in self.optimizer.state().items()}
        tensors |= self.carried.tensors() | ({} if self.after is None else self.after.tensors(AFTER))
        tensors |= {HANDED_IN + name: value for name, value in handed_in.items()}
        tensors["random/torch"] = torch.get_rng_state()
        carries_on = self.after is not None
        facts = {"job": self.job.digest().hex(), "steps": self.optimizer.steps, "carries_on": carries_on}
        state_files.save(self.out, self.completed, tensors, facts, keep=KEPT_CHECKPOINTS, keep_first=True)

    def _say_unreadable(self, number: int, error: CheckpointError) -> None:
        self.report({"event": "checkpoint_unreadable", "number": number, "reason": error.message})
