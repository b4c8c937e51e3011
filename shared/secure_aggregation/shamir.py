"""Shamir's secret sharing (Communications of the ACM 22, 1979) over the integers modulo a prime.

The secret is a random polynomial's value at 0, a holder's share its value at the holder's point; any `threshold` shares
give the polynomial, fewer say nothing about it. PRIME is the least one above 2^256, so that a secret of 32 bytes is one
number. (PyCryptodome's, over GF(2^128), takes 140 times as long for 99 shares: docs/adr/0012-secure-aggregation.md.)

Python's integers do not take the same time for all values: who can time this process on its machine is not kept out.
"""

from collections.abc import Callable, Mapping, Sequence

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33

Random = Callable[[int], bytes]


def split(secret: bytes, threshold: int, points: Sequence[int], random: Random) -> dict[int, bytes]:
    """One share of 33 bytes for each point (distinct, from 1) of a secret of 32 bytes; `threshold` of them give it."""
    # 16 bytes more than the prime has, so that no remainder is noticeably more likely than another.
    coefficients = [int.from_bytes(random(SHARE_BYTES + 16)) % PRIME for _ in range(threshold - 1)]
    polynomial = [int.from_bytes(secret), *coefficients]
    return {point: evaluate(polynomial, point, PRIME).to_bytes(SHARE_BYTES) for point in points}


def combine(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret of 32 bytes that these shares, by point, lie on; None if it is no such number.

    Right if there are as many shares as the threshold, or more, and all of them are right.
    """
    secret = interpolate({point: int.from_bytes(share) for point, share in shares.items()}, PRIME)
    return secret.to_bytes(SECRET_BYTES) if secret < 2 ** (8 * SECRET_BYTES) else None


def evaluate(polynomial: Sequence[int], point: int, prime: int) -> int:
    """Horner's rule; coefficients from the constant one on."""
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * point + coefficient) % prime
    return value


def interpolate(values: Mapping[int, int], prime: int) -> int:
    """Lagrange's formula: at 0, the polynomial of least degree that takes these values at these points."""
    total = 0
    for point, value in values.items():
        numerator = denominator = 1
        for other in values:
            if other != point:
                numerator = numerator * other % prime
                denominator = denominator * (other - point) % prime
        total += value * numerator * pow(denominator, -1, prime)
    return total % prime
