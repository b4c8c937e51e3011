"""Tensors as raw frames: sizes checked before anything is built.

A `TensorInfo` travels in the message, the values in a frame of their own, row-major, in one of the number formats of
shared/payload/codecs.py. The format is one of a closed set and never looked up by a peer's name; a frame has exactly
the size that format and shape give.

float16 spans only 6e-8 to 65504, gradients do not: such a tensor travels divided by a power of two, `scale`, chosen so
that its largest magnitude lies just under 2^14. Powers of two change no mantissa.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from shared.errors import TensorError
from shared.job import WireFormat
from shared.payload.codecs import CODECS
from shared.wire.envelope import Frame

MAX_ELEMENTS = 2**31
FLOAT16_TOP = 14


class TensorInfo(BaseModel):
    """Name, number format, shape and power-of-two scale of one tensor frame."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: Annotated[str, Field(max_length=256)]
    dtype: WireFormat
    shape: Annotated[tuple[Annotated[int, Field(ge=0, le=MAX_ELEMENTS)], ...], Field(max_length=8)]
    scale: Annotated[float, Field(gt=0)] = 1.0


def encode(name: str, tensor: Tensor, wire_format: WireFormat) -> tuple[TensorInfo, memoryview]:
    """`tensor` (any shape, float) as info and bytes in `wire_format`. The bytes may be the tensor's own memory."""
    values = tensor.detach()
    scale = 1.0
    if wire_format == "float16":
        scale = _float16_scale(values)
        values = values / scale
    info = TensorInfo(name=name, dtype=wire_format, shape=tuple(values.shape), scale=scale)
    if values.numel() == 0:
        return info, memoryview(b"")
    return info, CODECS[wire_format].encode(values).cpu().numpy().data


def decode(
    info: TensorInfo, frame: Frame, *, shape: Sequence[int | None] | None = None, dtype: WireFormat | None = None
) -> Tensor:
    """The tensor, float32, in memory of its own.

    `shape` (None matches any size) and `dtype` are what the receiver expects. Raises TensorError if they differ, if
    the frame's size is not that of the shape, or if a value is NaN or infinite.
    """
    if dtype is not None and info.dtype != dtype:
        raise TensorError(f"tensor {info.name!r} is {info.dtype}, the job says {dtype}")
    if shape is not None and not _matches(info.shape, shape):
        wanted = "x".join("?" if size is None else str(size) for size in shape)
        raise TensorError(f"tensor {info.name!r} is {'x'.join(map(str, info.shape))}, expected {wanted}")
    elements = math.prod(info.shape)
    size = memoryview(frame).nbytes
    codec = CODECS[info.dtype]
    strides = math.prod(max(1, length) for length in info.shape)  # may be large where there is no element
    if strides > MAX_ELEMENTS or size != (codec.size(info.shape) if elements else 0):
        raise TensorError(f"tensor {info.name!r}: {size} bytes are not {elements} values of {info.dtype}")
    if elements == 0:
        return torch.zeros(info.shape)
    raw = frame if isinstance(frame, bytearray) else bytearray(frame)
    values = codec.decode(torch.frombuffer(raw, dtype=torch.uint8), info.shape)
    if info.scale != 1.0:
        values = values * info.scale
    if not bool(torch.isfinite(values).all()):
        raise TensorError(f"tensor {info.name!r} holds NaN or infinite values")
    return values


def _matches(actual: Sequence[int], expected: Sequence[int | None]) -> bool:
    return len(actual) == len(expected) and all(
        want is None or have == want for have, want in zip(actual, expected, strict=True)
    )


def _float16_scale(values: Tensor) -> float:
    top = float(values.abs().max()) if values.numel() else 0.0
    if top == 0.0 or not math.isfinite(top):
        return 1.0
    return 2.0 ** (math.frexp(top)[1] - FLOAT16_TOP)
