"""Epsilon against closed forms, published values, and the library's other two accountants."""

import math
import sys

import dp_accounting
import pytest
from dp_accounting import pld, rdp

from shared.errors import UsageError
from worker_client.privacy.accounting import epsilon


def delta_of(epsilon: float, sigma: float) -> float:
    """The analytic Gaussian mechanism (Balle and Wang, arXiv 1805.06530, theorem 8)."""

    def below(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return below(1 / (2 * sigma) - epsilon * sigma) - math.exp(epsilon) * below(-1 / (2 * sigma) - epsilon * sigma)


def rdp_epsilon(sigma: float, rounds: int, delta: float) -> float:
    """Gaussian RDP, rounds x alpha / (2 sigma^2) (Mironov, arXiv 1702.07476), by its proposition 3, the best alpha."""
    orders = [1 + 10 ** (exponent / 50) for exponent in range(-250, 250)]
    return min(rounds * a / (2 * sigma**2) + math.log(1 / delta) / (a - 1) for a in orders)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 1.1, 4.0, 30.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_one_round_is_the_analytic_gaussian(sigma: float, delta: float) -> None:
    found = epsilon([(sigma, 1)], delta)
    if found == 0:
        assert delta_of(0, sigma) <= delta
    else:
        assert delta_of(found, sigma) == pytest.approx(delta, rel=1e-6)


def test_known_values() -> None:
    """sigma 1, delta 1e-5: 4.377; the classical bound sqrt(2 ln(1.25 / delta)) / sigma is looser."""
    assert epsilon([(1.0, 1)], 1e-5) == pytest.approx(4.377178, abs=1e-5)
    assert epsilon([(10.0, 1)], 1e-5) < math.sqrt(2 * math.log(1.25e5)) / 10


@pytest.mark.parametrize(("sigma", "rounds"), [(0.8, 5), (1.1, 100), (5.0, 50), (20.0, 1000)])
def test_many_rounds_lie_under_renyi_and_at_the_loss_distribution(sigma: float, rounds: int) -> None:
    delta = 1e-5
    found = epsilon([(sigma, rounds)], delta)
    assert found == pytest.approx(epsilon([(sigma / math.sqrt(rounds), 1)], delta), rel=1e-9)
    assert found < rdp_epsilon(sigma, rounds, delta)
    renyi = rdp.RdpAccountant()
    renyi.compose(dp_accounting.GaussianDpEvent(sigma), rounds)
    assert found <= renyi.get_epsilon(delta) < 1.35 * found
    losses = pld.PLDAccountant(value_discretization_interval=1e-3)
    losses.compose(dp_accounting.GaussianDpEvent(sigma), rounds)
    assert found == pytest.approx(losses.get_epsilon(delta), rel=1e-3)


def test_unlike_jobs_add_up() -> None:
    """In 1 / sigma^2; more than either, less than the sum of their epsilons."""
    both = epsilon([(1.0, 2), (2.0, 8)], 1e-6)
    assert both == epsilon([(2.0, 8), (1.0, 2)], 1e-6) == pytest.approx(epsilon([(0.5, 1)], 1e-6))
    parts = epsilon([(1.0, 2)], 1e-6), epsilon([(2.0, 8)], 1e-6)
    assert max(parts) < both < sum(parts)


def test_more_rounds_cost_more_and_none_cost_nothing() -> None:
    costs = [epsilon([(2.0, rounds)], 1e-5) for rounds in range(6)]
    assert costs[0] == epsilon([], 1e-5) == 0
    assert costs == sorted(set(costs))


def test_the_extremes_of_a_job_are_finite() -> None:
    assert math.isfinite(epsilon([(1e-6, 2**53)], 1e-15))
    exact, bound = epsilon([(1.001e-3, 1)], 1e-5), epsilon([(0.999e-3, 1)], 1e-5)
    assert exact < bound < 1.01 * exact
    assert epsilon([(1e3, 1)], 0.1) == 0
    assert 0 < epsilon([(1e3, 1)], 1e-15) < 0.01


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UsageError, match="dp-accounting"):
        epsilon([(1.0, 1)], 1e-5)
