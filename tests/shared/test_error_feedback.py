"""What is not sent is not lost: sums are accounted for, whatever the density and the number format."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.error_feedback import compress, decompress
from shared.errors import TensorError
from shared.job import WireFormat

FORMATS: tuple[WireFormat, ...] = get_args(WireFormat)
SHAPES = {"b": (7, 5), "a": (11,), "c": ()}


def difference(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


def summed(many: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name].double() for one in many]).sum(0) for name in SHAPES}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMATS), st.floats(0.01, 1.0), st.integers(0, 1000))
def test_all_that_was_sent_and_what_is_left_are_the_sum_of_all_differences(
    wire_format: WireFormat, density: float, seed: int
) -> None:
    true, sent, unsent = [], [], dict[str, Tensor]()
    for round in range(6):
        true.append(difference(seed + round))
        compressed = compress(true[-1], unsent, density, wire_format)
        arrived = decompress(compressed.pieces, compressed.frames, SHAPES, density, wire_format)
        assert all(torch.equal(arrived[name], compressed.sent[name]) for name in SHAPES)
        sent.append(arrived)
        unsent = compressed.unsent
    wanted, made = summed(true), summed([*sent, unsent])
    for name in SHAPES:
        torch.testing.assert_close(made[name], wanted[name], rtol=1e-5, atol=2e-6)


@given(st.floats(0.01, 0.9), st.integers(0, 1000))
def test_in_whole_numbers_the_account_is_exact(density: float, seed: int) -> None:
    """Numbers whose sums float32 holds without rounding: nothing but what is left out differs."""
    random = torch.Generator().manual_seed(seed)
    true, sent, unsent = [], [], dict[str, Tensor]()
    for _ in range(8):
        true.append({n: torch.randint(-999, 999, s, generator=random).float() for n, s in SHAPES.items()})
        compressed = compress(true[-1], unsent, density, "float32")
        sent.append(compressed.sent)
        unsent = compressed.unsent
    wanted, made = summed(true), summed([*sent, unsent])
    assert all(torch.equal(made[name], wanted[name]) for name in SHAPES)


def test_the_largest_of_all_tensors_together_are_sent() -> None:
    values = difference(3)
    compressed = compress(values, {}, 0.2, "float32")
    flat = torch.cat([values[name].flatten() for name in sorted(SHAPES)])
    limit = flat.abs().sort(descending=True).values[8]  # 0.2 x 47 is 9
    for name in SHAPES:
        assert torch.equal(compressed.sent[name], torch.where(values[name].abs() >= limit, values[name], 0.0))


def test_of_equal_values_the_first_are_sent_and_zeros_never() -> None:
    compressed = compress({"x": torch.tensor([1.0, -1.0, 1.0, 0.0, 1.0])}, {}, 0.4, "float32")
    assert compressed.sent["x"].tolist() == [1.0, -1.0, 0.0, 0.0, 0.0]
    compressed = compress({"x": torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0])}, {}, 0.8, "float32")
    assert compressed.sent["x"].tolist() == [0.0, 0.0, 2.0, 0.0, 0.0]
    assert compressed.pieces[0].values.shape == (1,)


def test_one_value_at_least_is_sent() -> None:
    compressed = compress({"x": torch.tensor([1.0, -3.0, 2.0])}, {}, 1e-6, "float32")
    assert compressed.sent["x"].tolist() == [0.0, -3.0, 0.0]


def test_what_was_left_out_comes_later() -> None:
    still = {"x": torch.zeros(4)}
    first = compress({"x": torch.tensor([4.0, 3.0, 2.0, 1.0])}, {}, 0.25, "float32")
    second = compress(still, first.unsent, 0.25, "float32")
    third = compress(still, second.unsent, 0.25, "float32")
    assert [one.sent["x"].tolist() for one in (first, second, third)] == [[4, 0, 0, 0], [0, 3, 0, 0], [0, 0, 2, 0]]
    assert third.unsent["x"].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("wire_format", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_what_is_not_finite_travels_to_be_refused_and_is_not_remembered(
    density: float, bad: float, wire_format: WireFormat
) -> None:
    values, before = difference(1), difference(2)
    values["b"][3, 3] = bad
    compressed = compress(values, before, density, wire_format)
    assert compressed.sent == {}
    assert all(torch.equal(compressed.unsent[name], before[name]) for name in SHAPES)
    with pytest.raises(TensorError):
        decompress(compressed.pieces, compressed.frames, SHAPES, density, wire_format)


def test_more_than_the_density_is_refused() -> None:
    compressed = compress(difference(1), {}, 0.3, "float32")
    with pytest.raises(TensorError, match="14 of 47 values were sent; the job's density allows 9"):
        decompress(compressed.pieces, compressed.frames, SHAPES, 0.2, "float32")


def test_inputs_stay_as_they_were() -> None:
    values, before = difference(1), difference(2)
    compress(values, before, 0.3, "int8")
    assert all(torch.equal(values[name], difference(1)[name]) for name in SHAPES)
    assert all(torch.equal(before[name], difference(2)[name]) for name in SHAPES)
