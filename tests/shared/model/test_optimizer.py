"""The optimizer's schedules, and its state: what is loaded is all that counts for the next step."""

from typing import get_args

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from shared.job import Training
from shared.model.optimizer import PartOptimizer


def made(parameter: nn.Parameter) -> PartOptimizer:
    return PartOptimizer({"w": parameter}, Training(learning_rate=0.1, max_grad_norm=None), 10)


def test_gradients_of_an_unfinished_step_do_not_survive_going_back() -> None:
    calm, torn = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    one, other = made(calm), made(torn)
    torn.grad = torch.tensor([5.0, 5.0])
    other.load_state(other.state(), 0.0)
    for parameter, optimizer in ((calm, one), (torn, other)):
        (parameter**2).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert torch.equal(calm, torn)


@pytest.mark.parametrize("warmup_ratio", [0.0, 0.25, 0.2])
@pytest.mark.parametrize("kind", get_args(Training.model_fields["lr_scheduler_type"].annotation))
def test_every_schedule_is_that_of_transformers_bit_by_bit(kind: str, warmup_ratio: float) -> None:
    """Rates and parameters after each step; and where it goes on from a place, by itself or from what was kept."""
    steps = 12
    settings = {"learning_rate": 0.1, "lr_scheduler_type": kind, "warmup_ratio": warmup_ratio, "max_grad_norm": None}
    training = Training.model_validate(settings)
    ours, theirs = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    mine = PartOptimizer({"w": ours}, training, steps)
    plain = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0)
    warmup = {0.0: 0, 0.25: 3, 0.2: 3}[warmup_ratio]  # rounded up, as TrainingArguments.get_warmup_steps does
    schedule = get_scheduler(kind, plain, num_warmup_steps=warmup, num_training_steps=steps)
    rates = [rate(plain)]
    assert rate(mine.optimizer) == rates[0]
    for step in range(steps):
        for parameter in (ours, theirs):
            parameter.grad = torch.tensor([1.0, -2.0, 0.5, 3.0]) * (step + 1)
        mine.step()
        plain.step()
        schedule.step()
        rates.append(rate(plain))
        assert rate(mine.optimizer) == rates[-1]
        assert torch.equal(ours, theirs)
    assert len(set(rates)) > 1 or (kind.startswith("constant") and (kind == "constant" or not warmup_ratio))
    for place in (5, 0, steps, 2):
        mine.move_to(place)
        assert rate(mine.optimizer) == rates[place]
        again = PartOptimizer({"w": ours}, training, steps)
        again.load_state(mine.state(), place)
        assert rate(again.optimizer) == rates[place]


def rate(optimizer: torch.optim.Optimizer) -> float:
    (group,) = optimizer.param_groups
    return float(group["lr"])
