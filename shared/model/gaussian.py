"""Normal numbers for differential privacy: from the operating system's random bytes, which nobody can foretell.

torch's generators are no source for these: the CPU's takes 32 bits of its seed, and from some of its numbers the others
follow. Box and Muller's transform (Ann. Math. Statist. 29, 1958) of 53-bit numbers, in float64; magnitudes end at 8.6
standard deviations. Floating-point numbers are not real ones, and whoever sees all digits of a noised value may
learn more than the theory says (Mironov, CCS 2012): that is not claimed here.
"""

import math
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RandomBytes = Callable[[int], bytes]
PIECE = 2**19
_BITS = 53


def gaussian(shape: Sequence[int], std: float, random_bytes: RandomBytes = os.urandom) -> Tensor:
    """Independent normal numbers of mean 0 and standard deviation `std`, float64 on the CPU."""
    count = math.prod(shape)
    noise = torch.empty(count, dtype=torch.float64)
    for piece in torch.split(noise, 2 * PIECE):
        pairs = len(piece) // 2 + 1
        radius = (-2.0 * _uniform(pairs, random_bytes).log()).sqrt() * std
        angle = 2.0 * math.pi * _uniform(pairs, random_bytes)
        piece.copy_(torch.cat([radius * angle.cos(), radius * angle.sin()])[: len(piece)])
    return noise.view(tuple(shape))


def _uniform(count: int, random_bytes: RandomBytes) -> Tensor:
    """In (0, 1], float64: 1 to 2^53, over 2^53."""
    words = torch.frombuffer(bytearray(random_bytes(8 * count)), dtype=torch.int64)
    return words.bitwise_and_(2**_BITS - 1).add_(1).to(torch.float64).mul_(2.0**-_BITS)
