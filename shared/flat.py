"""Tensors as one vector: all values, row-major, tensors end to end in the order of their names.

The order is the protocol's (docs/protocol.md): of masked updates, of sealed averages, and of differences that travel in
part. Names are sorted as Python sorts strings, by code points.
"""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

Shapes = Mapping[str, Sequence[int]]


def length(shapes: Shapes) -> int:
    """How many values they have together."""
    return sum(prod(shape) for shape in shapes.values())


def join(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """The vector (length,), a copy. There must be a tensor at least."""
    return torch.cat([tensors[name].detach().flatten().to(device, dtype) for name in sorted(tensors)])


def part(vector: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """A vector (length,) as the tensors of these shapes, in the order of their names: views of it."""
    names = sorted(shapes)
    pieces = torch.split(vector, [prod(shapes[name]) for name in names])
    return {name: piece.view(tuple(shapes[name])) for name, piece in zip(names, pieces, strict=True)}
