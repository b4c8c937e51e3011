"""Which clients a round takes (`cohort.sampled`): FedAvg's random set S_t (McMahan et al., arXiv 1602.05629, alg. 1).

All clients are put in an order by a hash of seed, round and name, and the round takes the first of them: uniformly
without replacement, the same whoever came first and however often somebody was started again. Another client that
becomes known changes no more than one place of it.
"""

import hashlib
from collections.abc import Iterable


def drawn(clients: Iterable[str], count: int, seed: int, round: int) -> list[str]:
    """The first `count` of the clients in the order of `round` (from 0); all, if there are no more."""

    def place(client: str) -> bytes:
        return hashlib.sha256(f"{seed} round {round} {client}".encode()).digest()

    return sorted(clients, key=place)[:count]
