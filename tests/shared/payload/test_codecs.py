"""Blockwise number formats: how near what comes out is to what went in, the exact layout, and what is refused."""

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shared.errors import TensorError
from shared.job import WireFormat
from shared.payload.codecs import CENTRED_ROWS, CODECS, Blockwise
from shared.payload.tensors import TensorInfo, decode, encode

BLOCKWISE: list[WireFormat] = ["int8", "int4"]
# bfloat16 keeps 8 bits: rounding to it changes a number by at most this fraction.
SHORT_ERROR = 2.0**-8


def codec(wire_format: WireFormat) -> Blockwise:
    found = CODECS[wire_format]
    assert isinstance(found, Blockwise)
    return found


def sent(tensor: Tensor, wire_format: WireFormat) -> Tensor:
    info, frame = encode("x", tensor, wire_format)
    return decode(info, bytes(frame), shape=tensor.shape, dtype=wire_format)


def bound(table: Tensor, wire_format: WireFormat) -> Tensor:
    """(R, d): half a step of each value's block, and the rounding of step, minimum and centre to bfloat16."""
    made = codec(wire_format)
    levels = 2**made.bits - 1
    limits = torch.empty_like(table)
    for start in range(0, table.shape[1], made.block):
        block = table[:, start : start + made.block]
        reach = (block.amax(1) - block.amin(1)) / levels
        limits[:, start : start + made.block] = (reach * 0.51 + 2 * SHORT_ERROR * block.abs().amax(1)).unsqueeze(1)
    return limits


def tables() -> dict[str, Tensor]:
    """Fewer rows than the format centres, so that a block's error is that of its own values."""
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(9, 256, generator=draw)
    return {
        "normal": normal,
        "ragged last block": normal[:, :147],
        "narrow": normal[:, :3],
        "odd and short": normal[:, :1],
        "tiny": normal * 1e-30,
        "huge": normal * 1e30,
        "sizes from 1e-30 to 1e30": normal * 10.0 ** torch.linspace(-30, 30, 256),
        "one outlier": normal + 1e4 * torch.eye(9, 256),
        "far from zero": normal * 1e-3 + 100.0,
        "negative": -normal.abs() - 1.0,
    }


@pytest.mark.parametrize("name", tables())
@pytest.mark.parametrize("wire_format", BLOCKWISE)
def test_every_value_is_within_half_a_step_of_its_block(name: str, wire_format: WireFormat) -> None:
    table = tables()[name]
    error = (sent(table, wire_format) - table).abs()
    assert bool((error <= bound(table, wire_format)).all())


@pytest.mark.parametrize(("wire_format", "most"), [("int8", 0.007), ("int4", 0.1)])
def test_relative_error_of_normal_values(wire_format: WireFormat, most: float) -> None:
    table = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    assert float((sent(table, wire_format) - table).norm() / table.norm()) < most


@pytest.mark.parametrize("wire_format", BLOCKWISE)
@pytest.mark.parametrize("rows", [1, CENTRED_ROWS, 40])
def test_what_a_block_can_say_travels_unchanged(wire_format: WireFormat, rows: int) -> None:
    made = codec(wire_format)
    line = (torch.arange(128) % made.block - 8.0) * 0.25
    line[made.block - 1 :: made.block] = (2**made.bits - 9) * 0.25
    if made.bits == 4:
        line = line.clamp(max=7 * 0.25)
    # Signs alternate, so that columns have the mean 0 and no centre is taken off.
    table = torch.stack([line if row % 2 == 0 else -line for row in range(rows)])
    assert torch.equal(sent(table, wire_format), table)


@pytest.mark.parametrize("wire_format", BLOCKWISE)
def test_rows_of_zeros_stay_zero_beside_others(wire_format: WireFormat) -> None:
    table = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    table[::3] = 0.0
    assert torch.equal(sent(table, wire_format)[::3], table[::3])
    assert torch.equal(sent(torch.zeros(64, 96), wire_format), torch.zeros(64, 96))


@pytest.mark.parametrize("wire_format", BLOCKWISE)
def test_channels_that_are_large_in_every_row_do_not_drown_the_others(wire_format: WireFormat) -> None:
    plain = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    shifted = plain.clone()
    shifted[:, ::32] += 50.0
    quiet = [column for column in range(128) if column % 32]
    before = (sent(plain, wire_format) - plain)[:, quiet].norm()
    after = (sent(shifted, wire_format) - shifted)[:, quiet].norm()
    assert after < 1.3 * before


@pytest.mark.parametrize("wire_format", BLOCKWISE)
def test_the_same_values_give_the_same_bytes(wire_format: WireFormat) -> None:
    table = torch.randn(33, 70)
    assert bytes(encode("x", table, wire_format)[1]) == bytes(encode("x", table.clone(), wire_format)[1])


@pytest.mark.parametrize("shape", [(), (1,), (5, 0), (0, 5), (2, 3, 7)])
@pytest.mark.parametrize("wire_format", BLOCKWISE)
def test_any_number_of_dimensions_travels(shape: tuple[int, ...], wire_format: WireFormat) -> None:
    assert torch.allclose(sent(torch.ones(shape), wire_format), torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_values_of_another_dtype_and_layout_are_taken(dtype: torch.dtype) -> None:
    table = torch.randn(40, 20, dtype=dtype).T
    assert torch.equal(sent(table, "int8"), sent(table.float().contiguous(), "int8"))


@pytest.mark.parametrize(
    ("wire_format", "shape", "size"),
    [
        ("int8", (3, 128), 3 * (2 * 2 * 2 + 128)),
        ("int8", (3, 65), 3 * (2 * 2 * 2 + 65)),
        ("int8", (16, 64), 64 * 2 + 16 * (2 * 2 + 64)),
        ("int4", (3, 128), 3 * (4 * 2 * 2 + 64)),
        ("int4", (3, 33), 3 * (2 * 2 * 2 + 17)),
        ("int4", (128, 4096), 4096 * 2 + 128 * (128 * 2 * 2 + 2048)),
        ("int4", (2, 8, 32), 32 * 2 + 16 * (2 * 2 + 16)),
        ("int4", (), 2 * 2 + 1),
    ],
)
def test_frame_sizes(wire_format: WireFormat, shape: tuple[int, ...], size: int) -> None:
    assert CODECS[wire_format].size(shape) == size
    assert encode("x", torch.randn(shape), wire_format)[1].nbytes == size


def short(*values: float) -> bytes:
    """bfloat16: the upper half of float32."""
    return b"".join(struct.pack("<f", value)[2:] for value in values)


def test_frozen_layout_without_centre() -> None:
    row = [[-2.0, -1.5, 5.5, 0.0, 1.0]]
    info, frame = encode("x", torch.tensor(row), "int4")
    assert bytes(frame) == short(-2.0, 0.5) + bytes([0x10, 0x4F, 0x06])
    assert decode(info, frame).tolist() == row


def test_frozen_layout_with_centre() -> None:
    frame = short(8.0, 0.0) + short(*[-1.0] * 16) + short(*[0.5] * 16) + bytes([2, 4] * 16)
    info = TensorInfo(name="x", dtype="int8", shape=(16, 2))
    assert decode(info, frame).tolist() == [[8.0, 1.0]] * 16


@pytest.mark.parametrize("wire_format", BLOCKWISE)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_frame_of_another_size_is_refused(wire_format: WireFormat, change: int) -> None:
    info, frame = encode("x", torch.randn(20, 33), wire_format)
    wrong = bytes(frame)[:change] if change < 0 else bytes(frame) + b"\0"
    with pytest.raises(TensorError, match=f"bytes are not 660 values of {wire_format}"):
        decode(info, wrong)


@pytest.mark.parametrize("shape", [(2**31, 2**31), (2**31,), (2**31, 1), (1, 2**31)])
@pytest.mark.parametrize("wire_format", BLOCKWISE)
def test_a_shape_far_larger_than_its_frame_is_refused(wire_format: WireFormat, shape: tuple[int, ...]) -> None:
    with pytest.raises(TensorError, match="bytes are not"):
        decode(TensorInfo(name="x", dtype=wire_format, shape=shape), bytes(64))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("wire_format", BLOCKWISE)
def test_a_step_that_is_no_step_is_refused(wire_format: WireFormat, bad: float) -> None:
    frame = short(0.0, bad) + bytes(CODECS[wire_format].size((1, 8)) - 4)
    with pytest.raises(TensorError, match="step is negative, NaN or infinite"):
        decode(TensorInfo(name="x", dtype=wire_format, shape=(1, 8)), frame)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wire_format", BLOCKWISE)
def test_a_minimum_or_centre_that_is_not_finite_is_refused(wire_format: WireFormat, bad: float) -> None:
    size = CODECS[wire_format].size
    for frame, shape in [
        (short(bad) + bytes(size((1, 8)) - 2), (1, 8)),
        (short(bad) + bytes(size((16, 8)) - 2), (16, 8)),
    ]:
        with pytest.raises(TensorError, match="NaN or infinite"):
            decode(TensorInfo(name="x", dtype=wire_format, shape=shape), frame)


def test_a_step_that_overflows_is_refused() -> None:
    frame = short(0.0, 3e38) + bytes([255] * 8)
    with pytest.raises(TensorError, match="NaN or infinite"):
        decode(TensorInfo(name="x", dtype="int8", shape=(1, 8)), frame)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("wire_format", BLOCKWISE)
def test_values_that_are_not_finite_are_refused_at_the_receiver(wire_format: WireFormat, rows: int, bad: float) -> None:
    table = torch.randn(rows, 40)
    table[0, 17] = bad
    with pytest.raises(TensorError, match="NaN or infinite"):
        sent(table, wire_format)


@given(
    shape=st.lists(st.integers(0, 20), max_size=3),
    dtype=st.sampled_from(BLOCKWISE),
    scale=st.sampled_from([1.0, 1e-300, 1e300]),
    junk=st.binary(min_size=1, max_size=64),
    fits=st.booleans(),
)
def test_any_bytes_give_a_finite_tensor_or_a_tensor_error(
    shape: list[int], dtype: WireFormat, scale: float, junk: bytes, fits: bool
) -> None:
    info = TensorInfo(name="x", dtype=dtype, shape=tuple(shape), scale=scale)
    size = CODECS[dtype].size(shape) if math.prod(shape) else 0
    frame = (junk * (size // len(junk) + 1))[:size] if fits else junk
    try:
        tensor = decode(info, frame)
    except TensorError:
        return
    assert tensor.shape == tuple(shape)
    assert torch.isfinite(tensor).all()


@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=200),
    wire_format=st.sampled_from(BLOCKWISE),
    rows=st.integers(1, 4),
)
def test_any_values_come_back_within_the_bound(values: list[float], wire_format: WireFormat, rows: int) -> None:
    table = torch.tensor(values, dtype=torch.float32).expand(rows, -1)
    # Numbers near the smallest that float32 can say lose their last bits.
    assert bool(((sent(table, wire_format) - table).abs() <= bound(table, wire_format) + 1e-37).all())
