"""What a method of aggregation is: clients' updates to one change, and the change to the values all go on from.

An update is the client's values after its local steps; what is aggregated is the difference to the values that the
round began with, in float64. n updates; a tensor's differences are stacked to (n, ...).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared.job import Job

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Update:
    """One client's values by name; of some, in `changes`, the difference to the round's start itself.

    `scale`: what its difference counts times, where its norm is bounded.
    """

    client: str
    weight: int
    values: Tensors
    scale: float = 1.0
    changes: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """The aggregated difference, by name, float64; and how many updates it is of."""

    delta: Tensors
    updates: int


# The change of one round from its start, or None where so few updates cannot be judged.
Combine = Callable[[Job, Tensors, Sequence[Update]], dict[str, Tensor] | None]
# The values after the round, float32, and the method's new state, from the start, the change and the state before.
Step = Callable[[Job, Tensors, Change, Tensors], tuple[dict[str, Tensor], dict[str, Tensor]]]


@dataclass(frozen=True)
class Method:
    """`state` is empty before the first round, and kept in the server's checkpoints; `step` changes no input."""

    combine: Combine
    step: Step


def difference(start: Tensors, update: Update, name: str) -> Tensor:
    """What the client changed in one tensor, float64."""
    if name in update.changes:
        return update.changes[name].to(start[name].device).double() * update.scale
    return (update.values[name].double() - start[name].double()) * update.scale


def differences(start: Tensors, updates: Sequence[Update], name: str) -> Tensor:
    """(n, ...) float64."""
    return torch.stack([difference(start, update, name) for update in updates])


def add(job: Job, start: Tensors, change: Change, state: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The step of methods without a server optimizer: the change itself."""
    return {name: (value.double() + change.delta[name]).float() for name, value in start.items()}, dict(state)
