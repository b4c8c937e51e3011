"""What a client does to its update before it leaves: clip its length, and under local privacy add noise.

DP-FedAvg's per-user clipping (McMahan et al., arXiv 1710.06963, section 2, "flat"): d min(1, C / |d|), d the difference
to the round's start over all tensors together, |d| its L2 norm.
"""

import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from shared.job import GaussianPrivacy, LocalPrivacy
from shared.model.gaussian import RandomBytes, gaussian

Tensors = Mapping[str, Tensor]


def clipped(start: Tensors, values: Tensors, clip_norm: float) -> dict[str, Tensor]:
    """The difference, of L2 norm `clip_norm` at most, float64. Nothing where a value is not finite: no server would
    take such an update, and who is left out would change what the others' mean is over.
    """
    differences = {name: values[name].double() - start[name].double() for name in start}
    norm = math.sqrt(sum(float(difference.square().sum()) for difference in differences.values()))
    if not math.isfinite(norm):
        return {name: torch.zeros_like(difference) for name, difference in differences.items()}
    scale = min(1.0, clip_norm / norm) if norm else 1.0
    return {name: difference * scale for name, difference in differences.items()}


def protected(
    privacy: GaussianPrivacy, start: Tensors, values: Tensors, random_bytes: RandomBytes = os.urandom
) -> dict[str, Tensor]:
    """The difference as it may leave: clipped, under local privacy with noise, rounded to float32."""
    differences = clipped(start, values, privacy.clip_norm)
    if isinstance(privacy, LocalPrivacy):
        std = privacy.noise_multiplier * privacy.clip_norm
        for name, difference in differences.items():
            differences[name] = difference + gaussian(difference.shape, std, random_bytes)
    return {name: difference.float() for name, difference in differences.items()}


def moved(start: Tensors, differences: Tensors) -> dict[str, Tensor]:
    """The values to hand in, float32."""
    return {name: (value.double() + differences[name].double()).float() for name, value in start.items()}
