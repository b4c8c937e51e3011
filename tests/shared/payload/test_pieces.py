"""Vectors of which some values travel: whatever is sent arrives, and whatever else arrives is refused."""

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from shared.errors import TensorError
from shared.job import WireFormat
from shared.payload import pieces, positions
from shared.payload.pieces import Piece
from shared.payload.tensors import TensorInfo

FORMATS: tuple[WireFormat, ...] = get_args(WireFormat)


@st.composite
def some_positions(draw: st.DrawFn) -> tuple[list[int], int]:
    length = draw(st.integers(1, 400))
    return sorted(draw(st.sets(st.integers(0, length - 1)))), length


@given(some_positions())
def test_positions_come_back_in_the_announced_size(drawn: tuple[list[int], int]) -> None:
    wanted, length = drawn
    raw = positions.encode(np.array(wanted, dtype=np.int64), length)
    assert len(raw) == positions.size(len(wanted), length)
    assert positions.decode(np.frombuffer(raw, dtype=np.uint8), len(wanted), length).tolist() == wanted


@given(st.integers(1, 200), st.data())
def test_any_bytes_are_positions_in_one_way_or_none(length: int, data: st.DataObject) -> None:
    """What decodes ascends, lies within, and encodes to the same bytes: no two frames say the same."""
    count = data.draw(st.integers(0, length))
    size = positions.size(count, length)
    raw = data.draw(st.binary(min_size=size, max_size=size))
    try:
        found = positions.decode(np.frombuffer(raw, dtype=np.uint8), count, length)
    except TensorError:
        return
    assert len(found) == count
    assert all(0 <= one < length for one in found)
    assert all(one < other for one, other in itertools.pairwise(found))
    assert positions.encode(found, length) == raw


def test_frozen_bytes_of_positions() -> None:
    """2, 3, 5, 7, 11, 13 and 24 below 36: two low bits each; above them 0, 0, 1, 1, 2, 3 and 6 in unary."""
    raw = positions.encode(np.array([2, 3, 5, 7, 11, 13, 24]), 36)
    low = int.from_bytes(raw[:2], "little")
    assert [low >> 2 * place & 3 for place in range(7)] == [2, 3, 1, 3, 3, 1, 0]
    assert format(int.from_bytes(raw[2:], "little"), "b")[::-1] == "1101101010001"
    assert raw.hex() == "de075b11"


@pytest.mark.parametrize("bad", ["de475b11", "de075b91", "de075b13", "de075b01"])
def test_positions_that_are_not_are_refused(bad: str) -> None:
    raw = np.frombuffer(bytes.fromhex(bad), dtype=np.uint8)
    with pytest.raises(TensorError):
        positions.decode(raw, 7, 36)


def test_a_position_twice_and_one_beyond_are_refused() -> None:
    for wrong in ([4, 4, 5], [7, 6, 8], [1, 2, 9]):
        with pytest.raises(TensorError, match="do not ascend from 0 to 8"):
            positions.decode(np.frombuffer(_encode_anything(wrong, 9), dtype=np.uint8), 3, 9)


def _encode_anything(places: list[int], length: int) -> bytes:
    """As `encode`, of places that need not ascend: the low bits in any order, above them the sorted high ones."""
    low_bits = (length // len(places)).bit_length() - 1
    low = sum((place & (1 << low_bits) - 1) << low_bits * number for number, place in enumerate(places))
    high = sum(1 << (place >> low_bits) + number for number, place in enumerate(places))
    sizes = -(-len(places) * low_bits // 8), -(-(len(places) + (length - 1 >> low_bits)) // 8)
    return low.to_bytes(sizes[0], "little") + high.to_bytes(sizes[1], "little")


vectors = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=150)


@settings(max_examples=60)
@given(vectors, st.sampled_from(FORMATS), st.data())
def test_a_vector_comes_back_as_far_as_it_was_sent(
    values: list[float], wire_format: WireFormat, data: st.DataObject
) -> None:
    vector = torch.tensor(values)
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    sent, frames = pieces.encode(vector, chosen, wire_format)
    count = int(chosen.sum())
    back = pieces.decode(sent, frames, total=len(vector), most=count, dtype=wire_format)
    assert bool((back[~chosen] == 0).all())
    if wire_format == "float32":
        assert torch.equal(back[chosen], vector[chosen])
    elif count:
        spread = float(vector[chosen].max() - vector[chosen].min())
        most = float(vector[chosen].abs().max())
        step = spread / 15 if wire_format == "int4" else spread / 255 if wire_format == "int8" else 0.0
        assert float((back - vector)[chosen].abs().max()) <= 0.51 * step * 1.01 + 2**-7 * most + 1e-30
    if count:
        with pytest.raises(TensorError, match="the job's density allows"):
            pieces.decode(sent, frames, total=len(vector), most=count - 1, dtype=wire_format)


@given(st.binary(max_size=80), st.integers(1, 40), st.integers(0, 50), st.sampled_from(FORMATS))
def test_garbage_is_refused_or_a_finite_vector(raw: bytes, length: int, count: int, wire_format: WireFormat) -> None:
    piece = Piece(length=length, values=TensorInfo(name="", dtype=wire_format, shape=(count,)))
    try:
        vector = pieces.decode([piece], [raw], total=length, most=length, dtype=wire_format)
    except TensorError:
        return
    assert vector.shape == (length,)
    assert bool(vector.isfinite().all())
    assert int((vector != 0).sum()) <= count


def one(length: int = 8, shape: tuple[int, ...] = (2,), dtype: WireFormat = "float32") -> Piece:
    return Piece(length=length, values=TensorInfo(name="", dtype=dtype, shape=shape))


def frame(at: list[int], values: Tensor, length: int = 8) -> bytes:
    return positions.encode(np.array(at), length) + values.numpy().tobytes()


def test_what_does_not_fit_is_refused_by_name() -> None:
    good = frame([1, 6], torch.ones(2))
    assert pieces.decode([one()], [good], total=8, most=2, dtype="float32").tolist() == [0, 1, 0, 0, 0, 0, 1, 0]
    cases: tuple[tuple[list[Piece], list[bytes], int, str], ...] = (
        ([one()], [good], 9, "pieces of 8 values in all, expected 9"),
        ([], [], 8, "pieces of 0 values"),
        ([one(), one()], [good, good], 8, "pieces of 16 values"),
        ([one(shape=(2, 1))], [good], 8, "values of shape"),
        ([one(shape=(9,))], [good], 8, "values of shape"),
        ([one(dtype="int8")], [good], 8, "is int8, the job says float32"),
        ([one()], [good[:-1]], 8, "bytes are not 2 values"),
        ([one()], [good + b"\0"], 8, "bytes are not 2 values"),
        ([one()], [b""], 8, "bytes are not the positions"),
        ([one()], [frame([1, 6], torch.tensor([1.0, math.nan]))], 8, "NaN or infinite"),
        ([one()], [frame([1, 6], torch.tensor([1.0, math.inf]))], 8, "NaN or infinite"),
    )
    for sent, frames, total, said in cases:
        with pytest.raises(TensorError, match=said):
            pieces.decode(sent, frames, total=total, most=8, dtype="float32")


def test_a_piece_has_bounds() -> None:
    for length in (0, pieces.PIECE + 1):
        with pytest.raises(ValidationError):
            one(length=length)


def test_long_vectors_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 64)
    vector = torch.randn(150, generator=torch.Generator().manual_seed(0))
    chosen = vector.abs() > 0.5
    sent, frames = pieces.encode(vector, chosen, "float32")
    assert [piece.length for piece in sent] == [64, 64, 22]
    back = pieces.decode(sent, frames, total=150, most=150, dtype="float32")
    assert torch.equal(back, torch.where(chosen, vector, 0.0))
