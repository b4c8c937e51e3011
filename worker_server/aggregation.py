"""FedAvg (McMahan et al., arXiv 1602.05629, algorithm 1): the weighted mean of the clients' trained parameters."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shared.errors import TensorError


def weighted_mean(updates: Sequence[tuple[int, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The mean of the updates, weighted, summed in float64 in the order given; float32.

    Raises TensorError if the updates do not have the same names and shapes.
    """
    total = sum(weight for weight, _ in updates)
    first = updates[0][1]
    for _, update in updates:
        difference = update.keys() ^ first.keys()
        if difference:
            raise TensorError(f"updates differ in {len(difference)} tensors, for example {sorted(difference)[0]!r}")
    mean: dict[str, Tensor] = {}
    for name, reference in first.items():
        sum_ = torch.zeros_like(reference, dtype=torch.float64)
        for weight, update in updates:
            if update[name].shape != reference.shape:
                raise TensorError(f"updates differ in the shape of {name!r}")
            sum_ += update[name].double() * (weight / total)
        mean[name] = sum_.float()
    return mean
