"""The optimizer's state: what is loaded is all that counts for the next step."""

import torch
from torch import nn

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
