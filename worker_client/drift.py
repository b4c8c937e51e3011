"""Against drift: what a client adds to the gradients of head and tail, so that local steps do not lead it too far off.

FedProx (Li et al., arXiv 1812.06127, section 3.2): the gradient of mu / 2 |w - w_round|^2, before clipping. SCAFFOLD
(Karimireddy et al., arXiv 1910.06378, algorithm 1, option II): c - c_i.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shared.job import Job, Scaffold

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Drift:
    """One round's. `start`: what it began with, if anything is added; `correction`: c - c_i by name, or nothing."""

    proximal_mu: float
    start: Tensors
    correction: Tensors

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add to the parameters' gradients, in place."""
        for name, parameter in parameters.items():
            added = self.correction.get(name)
            if self.proximal_mu:
                proximal = self.proximal_mu * (parameter.detach() - self.start[name])
                added = proximal if added is None else added + proximal
            if added is not None:
                parameter.grad = added.clone() if parameter.grad is None else parameter.grad + added


def begin(job: Job, start: Tensors, control: Tensors, own: Tensors) -> Drift:
    """Of a round that begins with `start`, with the server's control variate c and this client's c_i; either may lack,
    which is 0.
    """
    correction = {}
    if isinstance(job.aggregation, Scaffold):
        correction = {name: _of(control, name, value) - _of(own, name, value) for name, value in start.items()}
    return Drift(job.aggregation.proximal_mu, start, correction)


def next_control(job: Job, drift: Drift, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """c_i after the round's K local steps: c_i - c + (w_round - w) / (K lr). Nothing without SCAFFOLD."""
    way = job.rounds.local_steps * job.training.learning_rate
    return {
        name: (drift.start[name] - parameters[name].detach()) / way - correction
        for name, correction in drift.correction.items()
    }


def _of(control: Tensors, name: str, like: Tensor) -> Tensor:
    return control[name] if name in control else torch.zeros_like(like)
