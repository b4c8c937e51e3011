"""Shamir's sharing against a published example, and what any number of shares gives."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.secure_aggregation.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, combine, evaluate, interpolate, split

# The example of https://en.wikipedia.org/wiki/Shamir%27s_secret_sharing: S = 1234, a1 = 166, a2 = 94, p = 1613.
EXAMPLE = {1: 1494, 2: 329, 3: 965, 4: 176, 5: 1188, 6: 775}


def test_the_published_example() -> None:
    assert {point: evaluate([1234, 166, 94], point, 1613) for point in range(1, 7)} == EXAMPLE
    for points in ((2, 4, 5), (1, 2, 3), (6, 1, 4)):
        assert interpolate({point: EXAMPLE[point] for point in points}, 1613) == 1234


def test_the_prime_is_prime() -> None:
    """Miller and Rabin's test with the first 40 primes' worth of bases; 2^256 + 297 = 2^r d + 1."""
    d, r = PRIME - 1, 0
    while d % 2 == 0:
        d, r = d // 2, r + 1
    for base in range(2, 180):
        x = pow(base, d, PRIME)
        assert x in (1, PRIME - 1) or any((x := x * x % PRIME) == PRIME - 1 for _ in range(r - 1))


@settings(max_examples=50, deadline=None)
@given(data=st.data(), secret=st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES))
def test_any_threshold_of_shares_gives_the_secret(data: st.DataObject, secret: bytes) -> None:
    points = data.draw(st.lists(st.integers(1, 10_000), min_size=2, max_size=12, unique=True))
    threshold = data.draw(st.integers(2, len(points)))
    shares = split(secret, threshold, points, os.urandom)
    chosen = data.draw(st.permutations(points))[: data.draw(st.integers(threshold, len(points)))]
    assert all(len(share) == SHARE_BYTES for share in shares.values())
    assert combine({point: shares[point] for point in chosen}) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_the_least_and_the_largest_secret(secret: bytes) -> None:
    assert combine(split(secret, 3, (1, 2, 3), os.urandom)) == secret


def test_fewer_shares_fit_every_secret() -> None:
    shares = split(b"s" * 32, 3, (1, 2, 3), os.urandom)
    for other in (bytes(32), b"t" * 32):
        # A third point that would make the other secret of the two shares is as likely as the true one.
        held = {point: int.from_bytes(shares[point]) for point in (1, 2)}
        third = interpolate({point - 3: value for point, value in ({0: int.from_bytes(other)} | held).items()}, PRIME)
        assert combine({1: shares[1], 2: shares[2], 3: third.to_bytes(SHARE_BYTES)}) == other


def test_a_wrong_share_gives_another_secret_or_none() -> None:
    shares = split(b"s" * 32, 2, (1, 2), os.urandom)
    for wrong in (bytes(SHARE_BYTES), b"\xff" * SHARE_BYTES):
        assert combine({1: shares[1], 2: wrong}) != b"s" * 32


def test_coefficients_are_drawn_anew() -> None:
    assert split(b"s" * 32, 2, (1,), os.urandom) != split(b"s" * 32, 2, (1,), os.urandom)
