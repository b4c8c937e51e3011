"""Who shares masks with whom: all with all (SecAgg), k neighbours on a shuffled circle (SecAgg+), or two (a ring).

Bell, Bonawitz, Gascon, Lepoint and Raykova, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead" (CCS
2020), section 3: a Harary graph whose places are shuffled. Here the seed of the shuffle is the hash of all advertised
keys, so that everybody computes the same graph and neither the server nor a client picks it after having seen it.
"""

import hashlib
from collections.abc import Iterable, Sequence
from math import comb


def shuffled(seed: bytes, clients: Iterable[int]) -> list[int]:
    """The clients in the order of SHA-256(seed, number as 4 bytes)."""
    return sorted(clients, key=lambda client: hashlib.sha256(seed + client.to_bytes(4)).digest())


def neighbours_at(order: Sequence[int], place: int, k: int) -> list[int]:
    """The k nearest on the circle to the client at `place`, ascending; all others if there are not more than k."""
    n = len(order)
    if k >= n - 1:
        return sorted(set(order) - {order[place]})
    steps = range(1, k // 2 + 1)
    return sorted(order[(place + sign * step) % n] for step in steps for sign in (1, -1))


def choose(
    clients: int, *, corrupt: float, dropped: float, security_bits: int = 40, success_bits: int = 30
) -> tuple[int, int]:
    """The smallest (neighbours, threshold) for which all of these hold; raises ValueError if none is.

    With the shares `corrupt` of clients that help the server and `dropped` of those that drop out:

    1. except with probability 2^-security_bits, no client has `threshold` neighbours that help the server (a union
       bound over clients; a client's neighbours are a random sample of the others: hypergeometric tails, computed
       exactly);
    2. with the same probability, those who neither help nor drop out stay connected: no neighbours/2 in a row do;
    3. except with probability 2^-success_bits, every client keeps `threshold` neighbours;
    4. `threshold` is more than half of the neighbours (terms.py), which the paper asks for only of active attackers.
    """
    others = clients - 1
    corrupted, gone = (min(others, round(share * clients)) for share in (corrupt, dropped))
    for k in [*range(2, others, 2), others]:
        if k < others and clients * (corrupt + dropped) ** (k // 2) > 2**-security_bits:
            continue
        if threshold := _threshold(clients, k, corrupted, gone, security_bits, success_bits):
            return k, threshold
    raise ValueError(f"{clients} clients cannot stand {corrupt:.0%} that help the server and {dropped:.0%} drop-outs")


def _threshold(clients: int, k: int, corrupted: int, gone: int, security_bits: int, success_bits: int) -> int | None:
    for threshold in range(max(2, k // 2 + 1), k + 1):
        if clients * _tail(clients - 1, corrupted, k, threshold) <= 2**-security_bits:
            lost = _tail(clients - 1, gone, k, k - threshold + 1)
            return threshold if clients * lost <= 2**-success_bits else None
    return None


def _tail(population: int, marked: int, drawn: int, least: int) -> float:
    """The probability that `least` or more of `drawn` are marked."""
    ways = (comb(marked, i) * comb(population - marked, drawn - i) for i in range(least, min(drawn, marked) + 1))
    return sum(ways) / comb(population, drawn)
