"""The optimizer that each party runs over the part it holds: AdamW, schedule, clipping; and its state as tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from shared.job import Training


class PartOptimizer:
    """AdamW with the job's schedule over `total_steps`, clipped by the norm of these parameters.

    `parameters` by name; with none, a step does nothing. Schedules are those of transformers; `steps` is where the
    schedule is, which where every step counts as one is the number of steps.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], training: Training, total_steps: int) -> None:
        self.parameters = dict(parameters)
        self.max_grad_norm = training.max_grad_norm
        self.steps = 0.0
        if not self.parameters:
            return
        self.adamw = torch.optim.AdamW(
            self.parameters.values(),
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            weight_decay=training.weight_decay,
        )
        self.schedule = get_scheduler(
            training.lr_scheduler_type,
            self.adamw,
            num_warmup_steps=round(training.warmup_ratio * total_steps),
            num_training_steps=total_steps,
        )

    def step(self, steps: float = 1.0) -> None:
        """Clip, update, advance the schedule by `steps`, forget the gradients."""
        self.steps += steps
        if not self.parameters:
            return
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)
        self.adamw.step()
        self._set_rates()
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts, by `<field>/<parameter>`: plain tensors, no pickle."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for field, value in self.adamw.state.get(parameter, {}).items():
                state[f"{field}/{name}"] = value.detach().clone()
        return state

    def load_state(self, state: Mapping[str, Tensor], steps: float) -> None:
        """Continue from `state()`, taken at `steps` of the schedule; an unfinished step's gradients are dropped."""
        self.steps = steps
        if not self.parameters:
            return
        self.adamw.zero_grad(set_to_none=True)
        self.adamw.state.clear()
        for name, parameter in self.parameters.items():
            fields = {
                f: state[f"{f}/{name}"].clone() for f in ("step", "exp_avg", "exp_avg_sq") if f"{f}/{name}" in state
            }
            if fields:
                self.adamw.state[parameter] = fields
        self._set_rates()

    def _set_rates(self) -> None:
        # The schedule is a function of the position alone.
        for group, base, rule in zip(
            self.adamw.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * rule(self.steps)
