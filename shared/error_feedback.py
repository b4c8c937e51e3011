"""Differences that travel in part, at either end: the largest values, in few bits; what was left out comes later.

Sparsification by magnitude (top-k) after dense local steps, up and down with densities of their own, is FLASC's (Kuo et
al., arXiv 2406.05233). The memory, error feedback: what was not sent, rounding of the number format included, is added
to the next difference (Stich et al., arXiv 1809.07599, algorithm 1; after several local steps, of sparse and rounded
values: Basu et al., arXiv 1906.02367; at both ends: Tang et al., arXiv 1905.05957).

    v = difference + unsent        sent = rounded(top-k(v))        unsent = v - sent

The k largest are those of all tensors together, as one vector (flat.py). Of equal ones the first are
taken, and zeros are never sent: the same input gives the same bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared import flat
from shared.errors import TensorError
from shared.flat import Shapes
from shared.job import WireFormat
from shared.payload import pieces as wire
from shared.payload import positions
from shared.payload.codecs import CODECS
from shared.payload.pieces import Piece
from shared.wire.envelope import Frame

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Compressed:
    """What travels; what its receiver reads from it, `sent`; what is left for the next time, `unsent`."""

    pieces: tuple[Piece, ...]
    frames: tuple[bytes, ...]
    sent: dict[str, Tensor]
    unsent: dict[str, Tensor]


def compress(difference: Tensors, unsent: Tensors, density: float, wire_format: WireFormat) -> Compressed:
    """`difference` by name, float32, and what was left from the last one, or nothing.

    Values that no receiver would take (NaN, infinite, too large for the format) travel, so that it refuses them; for
    the next time nothing but `unsent` is kept then, and `sent` is empty.
    """
    vector = flat.join(difference)
    if unsent:
        vector = vector + flat.join(unsent)
    most = _most(density, len(vector))
    pieces, frames = wire.encode(vector, _largest(vector, most), wire_format)
    try:
        sent = wire.decode(pieces, frames, total=len(vector), most=most, dtype=wire_format)
    except TensorError:
        return Compressed(tuple(pieces), tuple(frames), {}, dict(unsent))
    shapes = {name: value.shape for name, value in difference.items()}
    return Compressed(tuple(pieces), tuple(frames), flat.part(sent, shapes), flat.part(vector - sent, shapes))


def decompress(
    pieces: Sequence[Piece], frames: Sequence[Frame], shapes: Shapes, density: float, wire_format: WireFormat
) -> dict[str, Tensor]:
    """What was sent of a difference of these shapes, float32. Raises TensorError if it cannot be that."""
    total = flat.length(shapes)
    vector = wire.decode(pieces, frames, total=total, most=_most(density, total), dtype=wire_format)
    return flat.part(vector, shapes)


def most_bytes(total: int, density: float, wire_format: WireFormat) -> int:
    """What a difference of `total` values takes on the wire at most; pieces that are cut take a few more."""
    if total == 0:
        return 0
    sent = _most(density, total)
    return CODECS[wire_format].size((sent,)) + positions.size(sent, total)


def _most(density: float, total: int) -> int:
    """How many of `total` values are sent at most: the share, rounded down, but one."""
    return min(total, max(1, int(density * total)))


def _largest(vector: Tensor, count: int) -> Tensor:
    """Where they are, (N,) bool. What is not finite is larger than all."""
    if count == len(vector):
        return torch.ones(len(vector), dtype=torch.bool)
    magnitudes = vector.abs().nan_to_num(nan=math.inf, posinf=math.inf).numpy()
    least = np.partition(magnitudes, len(magnitudes) - count)[len(magnitudes) - count]
    chosen = magnitudes > least
    equal = np.flatnonzero(magnitudes == least)
    chosen[equal[: count - int(chosen.sum())]] = least > 0
    return torch.from_numpy(chosen)
