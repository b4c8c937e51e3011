"""Synthetic hidden states and gradients: made once, sealed anew for every request."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loadtest.plan import Plan
from shared.payload.tensors import TensorInfo, encode
from shared.wire.envelope import Frame

POOL = 64
GRADIENT_SCALE = 1e-3


@dataclass(frozen=True)
class Batch:
    """Rows of `lengths` tokens, their hidden states (T, d) and a gradient of that shape, float32."""

    lengths: tuple[int, ...]
    hidden: tuple[TensorInfo, Frame]
    gradient: tuple[TensorInfo, Frame]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def make_batches(plan: Plan) -> Sequence[Batch]:
    """A pool to draw from, the same for the same seed."""
    chance = random.Random(plan.seed)
    generator = torch.Generator().manual_seed(plan.seed)
    made = []
    for _ in range(POOL):
        lengths = tuple(_length(plan, chance) for _ in range(plan.rows))
        values = torch.randn(2, sum(lengths), plan.hidden_size, generator=generator)
        made.append(Batch(lengths, encode("hidden", values[0], "float32"), _gradient(values[1])))
    return made


def _length(plan: Plan, chance: random.Random) -> int:
    return round(math.exp(chance.uniform(math.log(plan.shortest), math.log(plan.longest))))


def _gradient(values: torch.Tensor) -> tuple[TensorInfo, Frame]:
    return encode("gradient", values * GRADIENT_SCALE, "float32")
