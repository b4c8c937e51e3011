"""Neighbours: the same for everybody, mutual, and as many as was chosen; the bounds that choose them."""

import hashlib
from itertools import pairwise
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.secure_aggregation.graph import _tail, choose, neighbours_at, shuffled


def graph(seed: bytes, clients: list[int], k: int) -> dict[int, list[int]]:
    order = shuffled(seed, clients)
    return {client: neighbours_at(order, place, k) for place, client in enumerate(order)}


@settings(max_examples=100, deadline=None)
@given(
    clients=st.sets(st.integers(0, 9_999), min_size=3, max_size=40), half=st.integers(1, 12), seed=st.binary(max_size=8)
)
def test_neighbours_are_mutual_and_k(clients: set[int], half: int, seed: bytes) -> None:
    made = graph(seed, sorted(clients), 2 * half)
    assert made == graph(seed, sorted(clients, reverse=True), 2 * half)
    for client, others in made.items():
        assert len(set(others) - {client}) == len(others) == min(2 * half, len(clients) - 1)
        assert others == sorted(others)
        assert all(client in made[other] for other in others)


def test_the_seed_shuffles() -> None:
    orders = {tuple(shuffled(hashlib.sha256(bytes([n])).digest(), range(20))) for n in range(50)}
    firsts = {order[0] for order in orders}
    assert len(orders) == 50
    assert len(firsts) > 10


def test_tails_are_those_of_a_hypergeometric_distribution() -> None:
    """5 of 50 marked, 10 drawn: the textbook's P(4) = 0.003964583…, P(5) = 0.0001189375…"""
    assert _tail(50, 5, 10, 5) == pytest.approx(0.0001189375, rel=1e-6)
    assert _tail(50, 5, 10, 4) == pytest.approx(0.003964583 + 0.0001189375, rel=1e-6)
    assert _tail(50, 5, 10, 0) == 1.0
    assert _tail(50, 5, 10, 6) == 0.0


@pytest.mark.parametrize("clients", [30, 100, 1000])
@pytest.mark.parametrize(("corrupt", "dropped"), [(0.1, 0.1), (0.2, 0.1), (0.1, 0.3), (0.0, 0.2)])
def test_what_is_chosen_keeps_its_promises(clients: int, corrupt: float, dropped: float) -> None:
    k, threshold = choose(clients, corrupt=corrupt, dropped=dropped)
    assert k <= clients - 1
    assert k % 2 == 0 or k == clients - 1
    assert k < 2 * threshold <= 2 * k
    n = clients - 1
    bad, gone = round(corrupt * clients), round(dropped * clients)

    def probability(marked: int, least: int) -> float:
        return sum(comb(marked, i) * comb(n - marked, k - i) / comb(n, k) for i in range(least, k + 1))

    assert clients * probability(bad, threshold) <= 2**-40
    assert clients * probability(gone, k - threshold + 1) <= 2**-30


def test_neighbours_grow_slowly() -> None:
    sizes = [choose(clients, corrupt=0.2, dropped=0.1)[0] for clients in (100, 1_000, 10_000)]
    assert sizes[0] < sizes[1] <= sizes[2] < 3 * sizes[0]
    assert all(later < 2 * earlier for earlier, later in pairwise(sizes))


def test_too_many_drop_outs_have_no_graph() -> None:
    with pytest.raises(ValueError, match="cannot stand"):
        choose(20, corrupt=0.5, dropped=0.5)
