"""A long vector of which some values are sent: pieces of up to PIECE values, one frame each.

A frame holds the positions of the values that are sent (shared/payload/positions.py), then the values themselves in a
number format of shared/payload/codecs.py, as one row. All others are 0. Where all are sent, there are no positions.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from shared.errors import TensorError
from shared.job import WireFormat
from shared.payload import positions, tensors
from shared.payload.tensors import TensorInfo
from shared.wire.envelope import Frame

PIECE = 2**22


class Piece(BaseModel):
    """How many values the piece is of, and the number format, shape (count,) and scale of those that are sent."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    length: Annotated[int, Field(ge=1, le=PIECE)]
    values: TensorInfo


def lengths(total: int) -> list[int]:
    """Of the pieces of a vector of `total` values."""
    return [min(PIECE, total - start) for start in range(0, total, PIECE)]


def encode(values: Tensor, chosen: Tensor, wire_format: WireFormat) -> tuple[list[Piece], list[bytes]]:
    """Of a vector (N,), float32, the values where `chosen`, (N,) bool."""
    pieces, frames = [], []
    parts = lengths(len(values))
    for part, where in zip(torch.split(values, parts), torch.split(chosen, parts), strict=True):
        at = where.nonzero().flatten()
        info, raw = tensors.encode("", part[at], wire_format)
        pieces.append(Piece(length=len(part), values=info))
        frames.append(positions.encode(at.numpy(), len(part)) + bytes(raw))
    return pieces, frames


def decode(pieces: Sequence[Piece], frames: Sequence[Frame], *, total: int, most: int, dtype: WireFormat) -> Tensor:
    """The vector (total,), float32, with 0 where nothing was sent.

    Raises TensorError unless these are the pieces of so long a vector, `most` values at most were sent, in `dtype`,
    each frame has the size that follows, positions ascend, and no value is NaN or infinite.
    """
    if [piece.length for piece in pieces] != lengths(total):
        raise TensorError(f"pieces of {sum(piece.length for piece in pieces)} values in all, expected {total}")
    counts = [_count(piece) for piece in pieces]
    if sum(counts) > most:
        raise TensorError(f"{sum(counts)} of {total} values were sent; the job's density allows {most}")
    vector = torch.zeros(total)
    for piece, count, frame, part in zip(pieces, counts, frames, torch.split(vector, lengths(total)), strict=True):
        raw = memoryview(frame)
        cut = positions.size(count, piece.length)
        if raw.nbytes < cut:
            raise TensorError(f"{raw.nbytes} bytes are not the positions of {count} values")
        values = tensors.decode(piece.values, raw[cut:], shape=(count,), dtype=dtype)
        at = positions.decode(np.frombuffer(raw[:cut], dtype=np.uint8), count, piece.length)
        part[torch.from_numpy(at)] = values
    return vector


def _count(piece: Piece) -> int:
    shape = piece.values.shape
    if len(shape) != 1 or shape[0] > piece.length:
        raise TensorError(f"a piece of {piece.length} values with values of shape {shape}")
    return shape[0]
