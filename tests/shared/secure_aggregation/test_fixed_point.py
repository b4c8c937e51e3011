"""Fixed-point words: sums cannot overflow, and are as near to the true sums as is said."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import AggregationError, TensorError
from shared.secure_aggregation.fixed_point import CHUNK, FixedPoint

CLIPS = st.floats(1e-6, 1e6)
WEIGHTS = st.integers(1, 2**28)
CLIENTS = st.integers(3, 10_000)


@settings(max_examples=300, deadline=None)
@given(clip=CLIPS, max_weight=WEIGHTS, clients=CLIENTS, sign=st.sampled_from([-1, 1]), group_key=st.booleans())
def test_all_clients_at_the_bound_do_not_overflow(
    clip: float, max_weight: int, clients: int, sign: int, group_key: bool
) -> None:
    encoding = FixedPoint.choose(
        clip=clip, max_weight=max_weight, clients=clients, largest_error=clip, group_key=group_key
    )
    words = encoding.encode(np.array([sign * 2 * clip], np.float32), max_weight)
    mean, weight = encoding.mean(words * encoding.dtype.type(clients), clients)
    assert weight == clients * max_weight
    assert abs(float(mean[0]) - sign * encoding.clip) <= encoding.largest_error(clients, weight)
    assert encoding.clip <= clip < encoding.clip * (1 + 1e-6)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), max_weight=WEIGHTS, group_key=st.booleans(), largest_error=st.sampled_from([1e-2, 1e-6, 1e-9]))
def test_a_mean_is_as_near_as_the_bound_says(
    data: st.DataObject, max_weight: int, group_key: bool, largest_error: float
) -> None:
    clients = data.draw(st.integers(3, 20))
    values = data.draw(
        st.lists(st.floats(-2, 2, width=32), min_size=clients, max_size=clients).map(lambda v: np.array(v, np.float32))
    )
    weights = data.draw(st.lists(st.integers(1, max_weight), min_size=clients, max_size=clients))
    try:
        encoding = FixedPoint.choose(
            clip=1.0, max_weight=max_weight, clients=clients, largest_error=largest_error, group_key=group_key
        )
    except ValueError:
        assert max_weight * clients * largest_error**-1 > 2**50
        return
    assert 2.0 ** -(encoding.fraction_bits + 1) <= largest_error
    total = sum(encoding.encode(values[i : i + 1], weights[i]) for i in range(clients))
    mean, weight = encoding.mean(np.asarray(total, encoding.dtype), clients)
    # Integers in place of float64, which could not tell.
    exact = sum(int(v * 2**40) * w for v, w in zip(np.clip(values, -1, 1).astype(float), weights, strict=True))
    error = abs(float(mean[0]) - exact / 2**40 / weight)
    assert weight == sum(weights)
    assert error <= encoding.largest_error(clients, weight) + 2.0**-40


def test_small_words_are_taken_where_they_are_precise_enough() -> None:
    sizes = {
        error: FixedPoint.choose(clip=1.0, max_weight=1000, clients=10, largest_error=error, group_key=False).bits
        for error in (1e-5, 1e-12)
    }
    assert sizes == {1e-5: 32, 1e-12: 64}
    with pytest.raises(ValueError, match="largest_error: too small"):
        FixedPoint.choose(clip=1.0, max_weight=1000, clients=10, largest_error=1e-18, group_key=False)


def encoding() -> FixedPoint:
    return FixedPoint.choose(clip=0.1, max_weight=9, clients=10, largest_error=1e-6, group_key=False)


@pytest.mark.parametrize(
    ("values", "weight"),
    [
        (np.array([0.0, np.nan], np.float32), 1),
        (np.array([np.inf], np.float32), 1),
        (np.zeros(3), 1),
        (np.zeros((3, 1), np.float32), 1),
        (np.zeros(3, np.float32), 0),
        (np.zeros(3, np.float32), 10),
    ],
)
def test_what_cannot_be_summed_is_refused(values: np.ndarray, weight: int) -> None:
    with pytest.raises(TensorError):
        encoding().encode(values, weight)


def test_clipping_is_counted() -> None:
    values = np.full(CHUNK + 2, 0.05, np.float32)
    values[[0, CHUNK, CHUNK + 1]] = [0.2, -0.3, 0.1]
    assert encoding().clipped(values) == 3  # the bound is 0.1 rounded down to a float32
    assert encoding().clipped(values * np.float32(0.25)) == 0


def test_masks_that_are_left_in_a_sum_are_noticed() -> None:
    words = encoding().encode(np.zeros(4, np.float32), 1)
    words += np.frombuffer(bytes(range(40, 40 + words.nbytes)), words.dtype)
    with pytest.raises(AggregationError, match="masks did not cancel"):
        encoding().mean(words, 3)


def test_memory_beside_the_result_does_not_grow_with_the_length() -> None:
    values = np.zeros(2_000_000, np.float32)
    tracemalloc.start()
    words = encoding().encode(values, 3)
    peak = tracemalloc.get_traced_memory()[1] - words.nbytes
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    encoding().mean(words, 1)
    peak_back = tracemalloc.get_traced_memory()[1] - before - values.nbytes
    tracemalloc.stop()
    assert max(peak, peak_back) < 4 * 2**20
