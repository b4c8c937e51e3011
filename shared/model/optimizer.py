"""The optimizer that each party runs over the part it holds: AdamW or SGD, schedule, clipping; its state as tensors."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from shared.job import Training


class PartOptimizer:
    """The job's optimizer with its schedule over `total_steps`, clipped by the norm of these parameters.

    `parameters` by name; with none, a step does nothing. Schedules are those of transformers; `steps` is where the
    schedule is, which where every step counts as one is the number of steps.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], training: Training, total_steps: int) -> None:
        self.parameters = dict(parameters)
        self.max_grad_norm = training.max_grad_norm
        self.steps = 0.0
        if not self.parameters:
            return
        self.optimizer = _optimizer(self.parameters, training)
        self.schedule = get_scheduler(
            training.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=math.ceil(training.warmup_ratio * total_steps),
            num_training_steps=total_steps,
        )

    def step(self, steps: float = 1.0) -> None:
        """Clip, update, advance the schedule by `steps`, forget the gradients."""
        self.steps += steps
        if not self.parameters:
            return
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)
        self.optimizer.step()
        self._set_rates()
        self.optimizer.zero_grad(set_to_none=True)

    def move_to(self, steps: float) -> None:
        """Be at this place of the schedule: for who sat some steps out. Moments stay."""
        self.steps = steps
        if self.parameters:
            self._set_rates()

    def state(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts (SGD has none), by `<field>/<parameter>`: plain tensors, no pickle."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for field, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{field}/{name}"] = value.detach().clone()
        return state

    def load_state(self, state: Mapping[str, Tensor], steps: float) -> None:
        """Continue from `state()`, taken at `steps` of the schedule; an unfinished step's gradients are dropped."""
        self.steps = steps
        if not self.parameters:
            return
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        for name, parameter in self.parameters.items():
            fields = {
                f: state[f"{f}/{name}"].clone() for f in ("step", "exp_avg", "exp_avg_sq") if f"{f}/{name}" in state
            }
            if fields:
                self.optimizer.state[parameter] = fields
        self._set_rates()

    def _set_rates(self) -> None:
        # The schedule is a function of the position alone.
        for group, base, rule in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * rule(self.steps)


def _optimizer(parameters: Mapping[str, nn.Parameter], training: Training) -> torch.optim.Optimizer:
    if training.optim == "sgd":
        return torch.optim.SGD(parameters.values(), lr=training.learning_rate, weight_decay=training.weight_decay)
    return torch.optim.AdamW(
        parameters.values(),
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        weight_decay=training.weight_decay,
    )
