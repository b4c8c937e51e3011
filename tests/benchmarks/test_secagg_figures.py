"""What the benchmark extrapolates has the bytes and the work of what it measures whole."""

import pytest

from benchmarks import secagg
from benchmarks.secagg import Case, measure


@pytest.mark.parametrize("method", ["SecAgg", "SecAgg+", "ring"])
@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_sampled_rows_send_what_whole_ones_send(method: secagg.Method, dropped: float) -> None:
    case = Case(method, 30 if method == "SecAgg+" else 10, dropped)
    whole, sampled = measure(case, 5_000, 1e12), measure(case, 5_000, 0)
    assert (whole.sampled, sampled.sampled) == (False, True)
    assert sampled.sent_bytes == pytest.approx(whole.sent_bytes, rel=1e-3)
    assert whole.received_bytes == pytest.approx(sampled.received_bytes, rel=0.05)
    for found in (whole, sampled):
        assert 0 < found.error_over_bound < 1
        assert found.largest_sum_error <= secagg.LARGEST_ERROR


def test_the_masks_counted_are_those_computed() -> None:
    """10 clients, 3 gone: 7 self-masks and 3 x 7 pair masks at the server."""
    played = secagg.play(Case("SecAgg", 10, 0.3), 1_000)
    assert (played.server_masks, played.client_masks, played.inputs) == (7 + 21, 10, 7)
    ring = secagg.play(Case("ring", 10, 0.3), 1_000)
    assert (ring.server_masks, ring.client_masks, ring.inputs, ring.maskings) == (0, 2, 14, 2)


def test_bytes_of_a_quick_run_are_counted_not_guessed() -> None:
    found = measure(Case("SecAgg", 10, 0.0), 5_000, 1e12)
    words, boxes = 4 * 5_001, 9 * (82 + 64)
    assert words + boxes < found.sent_bytes < words + 4 * boxes
