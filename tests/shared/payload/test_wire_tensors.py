"""Tensors as frames: what goes in comes out, and what does not fit is refused before anything is built."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.errors import TensorError
from shared.job import WireFormat
from shared.payload.tensors import TensorInfo, decode, encode


def sent(tensor: torch.Tensor, wire_format: WireFormat) -> torch.Tensor:
    info, frame = encode("x", tensor, wire_format)
    return decode(info, bytes(frame), shape=tensor.shape, dtype=wire_format)


def test_float32_travels_unchanged() -> None:
    tensor = torch.randn(7, 5)
    assert torch.equal(sent(tensor, "float32"), tensor)


@pytest.mark.parametrize("wire_format", ["bfloat16", "float16"])
def test_what_a_format_can_say_travels_unchanged(wire_format: WireFormat) -> None:
    tensor = torch.tensor([[0.0, 1.0, -0.5], [3.0, 1024.0, -0.25]])
    assert torch.equal(sent(tensor, wire_format), tensor)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 1e9, 1e30])
def test_float16_keeps_its_precision_at_any_size(size: float) -> None:
    tensor = torch.randn(100) * size
    error = (sent(tensor, "float16") - tensor).abs() / tensor.abs().max()
    assert error.max() < 2**-11


def test_zeros_and_nothing_travel_too() -> None:
    assert torch.equal(sent(torch.zeros(3, 2), "float16"), torch.zeros(3, 2))
    assert sent(torch.zeros(0, 4), "float32").shape == (0, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("wire_format", ["float32", "bfloat16", "float16"])
def test_values_that_are_not_finite_are_refused(bad: float, wire_format: WireFormat) -> None:
    with pytest.raises(TensorError, match="NaN or infinite"):
        sent(torch.tensor([1.0, bad]), wire_format)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"shape": (2, 3)}, "24 bytes|expected 3x2"),
        ({"shape": (3, 2, 1)}, "expected 3x2"),
        ({"dtype": "bfloat16"}, "the job says float32"),
    ],
)
def test_another_shape_or_format_is_refused(changed: dict[str, Any], said: str) -> None:
    info, frame = encode("x", torch.randn(3, 2), "float32")
    with pytest.raises(TensorError, match=said):
        decode(info.model_copy(update=changed), frame, shape=(3, 2), dtype="float32")


@pytest.mark.parametrize("shape", [(2**31, 2**31), (2**31,), (4,), (), (0, 2**31, 2**31), (2**31, 2**31, 0)])
def test_sizes_that_do_not_fit_the_frame_are_refused_before_memory_is_taken(shape: tuple[int, ...]) -> None:
    info = TensorInfo(name="x", dtype="float32", shape=shape)
    with pytest.raises(TensorError, match="bytes are not"):
        decode(info, bytes(12) if all(shape) else b"")


@pytest.mark.parametrize(
    "fields",
    [{"shape": (-1,)}, {"shape": (1,) * 9}, {"dtype": "int64"}, {"scale": 0.0}, {"scale": float("nan")}, {"more": 1}],
)
def test_infos_out_of_bounds_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TensorInfo.model_validate({"name": "x", "dtype": "float32", "shape": (1,)} | fields)


@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    frame=st.binary(max_size=80),
)
def test_any_bytes_give_a_tensor_or_a_tensor_error(shape: list[int], dtype: WireFormat, frame: bytes) -> None:
    info = TensorInfo(name="x", dtype=dtype, shape=tuple(shape))
    try:
        tensor = decode(info, frame)
    except TensorError:
        return
    assert tensor.shape == tuple(shape)
    assert torch.isfinite(tensor).all()
