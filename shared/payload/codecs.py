"""Number formats of the wire: pure functions from values to bytes and back, in a closed table.

Plain formats write each value as a little-endian float. Blockwise ones write whole numbers between the least and the
greatest value of a block of neighbours, from a table of R rows (all but the last dimension of the shape) by d columns
(the last one), with B = ceil(d / block) blocks a row; parts follow each other without gaps, row-major:

    centre    (d)              bfloat16   only if R >= CENTRED_ROWS
    minimum   (R, B)           bfloat16
    step      (R, B)           bfloat16   not negative
    codes     (R, d)           uint8, or
              (R, ceil(d / 2)) uint8      4 bits each, the first column in the low half

    value = centre + minimum + code x step

bfloat16 spans the range of float32, so gradients of any size need no further scale. The centre is for hidden states: a
few channels are large in every token, and would set the step of their block. The sender gives the column's mean where
that is far from zero, and zero elsewhere, so that rows of zeros stay exactly zero. It is of this frame alone: no state
is kept between frames, nothing is random.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import TensorError
from shared.job import WireFormat

# With fewer rows the centre costs more bytes than it is worth.
CENTRED_ROWS = 16
# A mean is far from zero if it is more than half a standard deviation: mean^2 > variance / 4.
FAR = 5.0
SHORT = torch.bfloat16


class Codec(Protocol):
    """`size`: bytes of a frame of this shape. `encode`: values to uint8 (size,), on the device of the values, undefined
    bytes for NaN or infinite ones that `decode` or its caller refuses. `decode`: uint8 (size,) to float32 of `shape`,
    which has at least one value; raises TensorError."""

    def size(self, shape: Sequence[int]) -> int: ...

    def encode(self, values: Tensor) -> Tensor: ...

    def decode(self, raw: Tensor, shape: Sequence[int]) -> Tensor: ...


@dataclass(frozen=True)
class Plain:
    """One float a value, row-major."""

    dtype: torch.dtype

    def size(self, shape: Sequence[int]) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def encode(self, values: Tensor) -> Tensor:
        return _bytes(values.to(self.dtype))

    def decode(self, raw: Tensor, shape: Sequence[int]) -> Tensor:
        return raw.view(self.dtype).reshape(tuple(shape)).to(torch.float32)


@dataclass(frozen=True)
class Blockwise:
    """Whole numbers of `bits` bits, with a minimum and a step for every `block` values. The error of a value is at most
    half a step, and the rounding of centre, minimum and step to bfloat16."""

    bits: Literal[4, 8]
    block: int

    def size(self, shape: Sequence[int]) -> int:
        return sum(self._sizes(*_table(shape)))

    def encode(self, values: Tensor) -> Tensor:
        rows, columns = _table(values.shape)
        table = values.reshape(rows, columns).to(torch.float32)
        parts = []
        if rows >= CENTRED_ROWS:
            centre = _centre(table)
            table = table - centre
            parts.append(centre)
        blocks = self._blocks(table)
        minimum = blocks.amin(2).to(SHORT)
        step = ((blocks.amax(2) - minimum) / self._top).clamp_(min=0).to(SHORT)
        divisor = step.float().masked_fill_(step == 0, 1.0)
        codes = (blocks - minimum.unsqueeze(2)).div_(divisor.unsqueeze(2)).round_().clamp_(0, self._top)
        numbers = codes.to(torch.uint8).flatten(1)[:, :columns]
        parts += [minimum, step, numbers if self.bits == 8 else _pack(numbers)]
        return torch.cat([_bytes(part) for part in parts])

    def decode(self, raw: Tensor, shape: Sequence[int]) -> Tensor:
        rows, columns = _table(shape)
        centre, minimum, step, codes = torch.split_with_sizes(raw, self._sizes(rows, columns))
        steps = _short(step).reshape(rows, -1, 1)
        if not bool((torch.isfinite(steps) & (steps >= 0)).all()):
            raise TensorError("a block's step is negative, NaN or infinite")
        codes = codes.reshape(rows, -1)
        numbers = codes if self.bits == 8 else _unpack(codes)[:, :columns]
        blocks = self._blocks(numbers.float()).mul_(steps).add_(_short(minimum).reshape(rows, -1, 1))
        table = blocks.flatten(1)[:, :columns]
        if rows >= CENTRED_ROWS:
            table += _short(centre)
        values: Tensor = table.reshape(tuple(shape))
        return values

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1

    def _blocks(self, table: Tensor) -> Tensor:
        """(R, d) to (R, B, block), the last block filled up with its last column. Narrow tables have narrow blocks."""
        rows, columns = table.shape
        width = min(self.block, columns)
        missing = -columns % width
        if missing:
            table = torch.cat([table, table[:, -1:].expand(rows, missing)], dim=1)
        return table.reshape(rows, -1, width)

    def _sizes(self, rows: int, columns: int) -> list[int]:
        """Bytes of centre, minimum, step and codes."""
        centre = columns * SHORT.itemsize if rows >= CENTRED_ROWS else 0
        a_block = rows * -(-columns // self.block) * SHORT.itemsize
        return [centre, a_block, a_block, rows * -(-columns * self.bits // 8)]


CODECS: dict[WireFormat, Codec] = {
    "float32": Plain(torch.float32),
    "bfloat16": Plain(torch.bfloat16),
    "float16": Plain(torch.float16),
    "int8": Blockwise(bits=8, block=64),
    "int4": Blockwise(bits=4, block=32),
}


def _table(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a shape; a scalar is one row of one."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def _centre(table: Tensor) -> Tensor:
    """(d), bfloat16: column means, where they are far from zero."""
    mean = table.mean(0)
    far = FAR * mean.square() > table.square().mean(0)
    return torch.where(far, mean, 0.0).to(SHORT)


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().flatten().view(torch.uint8)


def _short(raw: Tensor) -> Tensor:
    """Bytes of bfloat16 values, anywhere in a frame, as float32."""
    return raw.clone().view(SHORT).float()


def _pack(numbers: Tensor) -> Tensor:
    """uint8 (R, d) of 0..15 to uint8 (R, ceil(d / 2))."""
    pairs = F.pad(numbers, (0, numbers.shape[1] % 2))
    return pairs[:, 0::2] | (pairs[:, 1::2] << 4)


def _unpack(packed: Tensor) -> Tensor:
    """uint8 (R, n) to uint8 (R, 2n)."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
