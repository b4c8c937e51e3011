"""Which client gets which row: pure functions from labels, numbers and a seed to a client for each row.

Each returns one client number a row, so that every row lands exactly once.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from shared.errors import UsageError

# With more, "label" is hardly what the field is; and time grows with their square.
MAX_LABELS = 1000


def by_field(labels: Sequence[str], clients: int | None) -> list[int]:
    """All rows of one value together. A client a value, values in sorted order; with fewer `clients`, the values with
    most rows first, each to the client with fewest rows so far. Raises UsageError for fewer values than clients.
    """
    counts = dict.fromkeys(sorted(set(labels)), 0)
    for label in labels:
        counts[label] += 1
    wanted = len(counts) if clients is None else clients
    if len(counts) < wanted:
        raise UsageError(
            f"the field has {len(counts)} values, fewer than {wanted} clients", hint=f"--clients {len(counts)}"
        )
    owner = dict(zip(counts, range(wanted), strict=False)) if len(counts) == wanted else _pack(counts, wanted)
    return [owner[label] for label in labels]


def _pack(counts: Mapping[str, int], clients: int) -> dict[str, int]:
    sizes = [0] * clients
    owner = {}
    for label in sorted(counts, key=lambda name: (-counts[name], name)):
        owner[label] = sizes.index(min(sizes))
        sizes[owner[label]] += counts[label]
    return owner


def by_dirichlet(labels: Sequence[str], clients: int, alpha: float, seed: int) -> list[int]:
    """Clients of equal size (to one row) whose mixes of labels differ, after Hsu, Qi and Brown 2019 (arXiv 1909.06335,
    section 3): each client draws its mix q from Dirichlet(alpha * p), p the labels' shares in the file; rows are drawn
    without replacement, and a label that is used up leaves the mixes of all.

    Small alpha: a client sees few labels; large: all see the file's mix. Clients draw in turn, one row each, so that
    what is left over at the end is no single client's. Raises UsageError for more than MAX_LABELS labels.
    """
    names = sorted(set(labels))
    if len(names) > MAX_LABELS:
        raise UsageError(
            f"the label has {len(names)} values in {len(labels)} rows; at most {MAX_LABELS} are dealt by",
            hint="name a field with few values with --label",
        )
    random = np.random.default_rng(seed)
    code = {name: number for number, name in enumerate(names)}
    pools: list[list[int]] = [[] for _ in names]
    for row in random.permutation(len(labels)).tolist():
        pools[code[labels[row]]].append(row)
    left = np.array([len(pool) for pool in pools], dtype=np.float64)
    mixes = _draw_mixes(left / left.sum(), clients, alpha, random)
    assigned = [0] * len(labels)
    upto: list[NDArray[np.float64] | None] = [None] * clients
    for turn in range(len(labels)):
        client = turn % clients
        sums = upto[client]
        if sums is None:
            # What a client wanted is used up: it takes of the rest as much as there is of each.
            mix = np.where(left > 0, mixes[client], 0.0)
            sums = upto[client] = np.cumsum(mix if mix.sum() > 0 else left)
        label = int(np.searchsorted(sums, random.random() * sums[-1], side="right"))
        assigned[pools[label].pop()] = client
        left[label] -= 1
        if left[label] == 0:
            upto = [None] * clients
    return assigned


def _draw_mixes(
    shares: NDArray[np.float64], clients: int, alpha: float, random: np.random.Generator
) -> NDArray[np.float64]:
    """(clients, labels). One label alone needs no draw."""
    if len(shares) == 1:
        return np.ones((clients, 1))
    mixes: NDArray[np.float64] = random.dirichlet(alpha * shares, size=clients)
    return mixes


def by_size(rows: int, shares: NDArray[np.float64], seed: int) -> list[int]:
    """Rows in random order, so many to each client as its share (of sum 1) says, to one row."""
    exact = shares * rows
    sizes = np.floor(exact).astype(int)
    for client in np.argsort(sizes - exact, kind="stable")[: rows - int(sizes.sum())]:
        sizes[client] += 1
    assigned = [0] * rows
    order = np.random.default_rng(seed).permutation(rows).tolist()
    for row, client in zip(order, np.repeat(np.arange(len(shares)), sizes).tolist(), strict=True):
        assigned[row] = client
    return assigned


def equal_shares(clients: int) -> NDArray[np.float64]:
    return np.full(clients, 1 / clients)


def power_law_shares(clients: int, exponent: float) -> NDArray[np.float64]:
    """Client i (from 1) has a share in proportion to i ** -exponent: 0 is equal, 1 is Zipf's law."""
    weights = np.arange(1, clients + 1, dtype=np.float64) ** -exponent
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def dirichlet_shares(clients: int, beta: float, seed: int) -> NDArray[np.float64]:
    """Shares drawn from Dirichlet(beta), after Li et al. 2022 (arXiv 2102.02079, section 4.3, quantity skew)."""
    # A stream of its own: the order of the rows is drawn from `seed` itself.
    shares: NDArray[np.float64] = np.random.default_rng([seed, 1]).dirichlet(np.full(clients, beta))
    return shares
