"""Secure sums against plain ones: seconds and bytes a client, the server's seconds, and how far the sums are apart.

SecAgg with 10 and 100 clients, SecAgg+ with 100 and 1,000 (neighbours and threshold for 10 % of clients that help the
server and as many drop-outs as the row says, at least 10 %), the ring with all three; 1M and 10M parameters; 0, 10
and 30 % drop-outs, after keys are shared and before inputs come: the most work for the server. The ring does a sum
that lost members again with those left, so its clients mask twice. Updates are normal with deviation 0.02, clipped at
0.1, weights 1 to 100, a mean's value right to 4e-6. Clients and server run one after the other in this process, on
one core; times are the median over clients and the server's whole; bytes are all messages, without seals and headers.

Where a whole round would be more than `--whole` bytes of masks, it is played by all clients with 1,000 parameters
instead ("sampled", * in the table), which measures everything that does not depend on the length, and what does is
measured by itself: a client's encoding and as many masks as it has, the median of 3; the server's adding of 3 inputs
and of 64 masks, times how many there are. Such rows are extrapolated, also their server's seconds, and the error is
that of the short sum.

"plain" is the server's time to add up the clients' float32 vectors in float64; "off" the largest error of the mean as a
share of the derived bound.
"""

import secrets
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Literal

import numpy as np

from benchmarks.masked_rounds import SERVER, Meter, Ring, off_by, people, play_round
from benchmarks.reporting import Goal, parser, publish
from shared.errors import TooFewLeft
from shared.identity import Identity
from shared.secure_aggregation import graph
from shared.secure_aggregation.fixed_point import Floats
from shared.secure_aggregation.masks import Mask, add_masks
from shared.secure_aggregation.server import MaskedSum
from shared.secure_aggregation.terms import Member, RingTerms, SumTerms, Terms

Method = Literal["SecAgg", "SecAgg+", "ring"]
SIZES: dict[Method, tuple[int, ...]] = {"SecAgg": (10, 100), "SecAgg+": (100, 1000), "ring": (10, 100, 1000)}
CORRUPT = 0.1
SHORT = 1_000
LARGEST_ERROR = 4e-6  # the least that 32-bit words of 1,000 clients allow
WHOLE_BYTES = 2e10
SAMPLED_CLIENTS = 3
SAMPLED_MASKS = 64


@dataclass(frozen=True)
class Case:
    method: Method
    clients: int
    dropped: float

    @property
    def gone(self) -> list[int]:
        """Every so many, so that no part of the roster is spared."""
        count = round(self.clients * self.dropped)
        return [place * self.clients // count for place in range(count)]


@dataclass(frozen=True)
class Figures:
    """`error_over_bound`: the largest error of the mean as a share of the derived bound."""

    neighbours: int
    client_s: float
    server_s: float
    plain_server_s: float
    sent_bytes: float
    received_bytes: float
    sent_over_plain: float
    largest_sum_error: float
    error_over_bound: float
    sampled: bool


@dataclass(frozen=True)
class Played:
    """One round: the median client's seconds and bytes, the server's seconds, and how many masks each computed."""

    terms: SumTerms
    neighbours: int
    client_s: float
    server_s: float
    sent: float
    received: float
    contributors: int
    inputs: int
    client_masks: int
    maskings: int
    server_masks: int
    error: float
    bound: float


def main(arguments: Sequence[str] | None = None) -> int:
    arguments_parser = parser("secagg", __doc__)
    arguments_parser.add_argument("--whole", type=float, default=WHOLE_BYTES, help="bytes of masks of a whole round")
    options = arguments_parser.parse_args(arguments)
    lengths = (100_000, 1_000_000) if options.quick else (1_000_000, 10_000_000)
    cases = [
        Case(method, clients, dropped)
        for method, sizes in SIZES.items()
        for clients in sizes
        for dropped in (0.0, 0.1, 0.3)
        if not (options.quick and clients > 100)
    ]
    rows, figures, measured = [], {}, []
    for case in cases:
        for length in lengths:
            found = measure(case, length, options.whole)
            measured.append(found)
            figures[f"{case.method}/{case.clients}/{length}/{case.dropped:g}"] = asdict(found)
            rows.append(_row(case, length, found))
            print(" ".join(rows[-1]), file=sys.stderr)
    columns = ("clients (neighbours), parameters, dropped", "client s", "server s", "plain", "MB up", "down", "off")
    goals = [
        Goal("largest_error_over_bound", max(found.error_over_bound for found in measured), 1.0, at_most=True),
        Goal("largest_sum_error", max(found.largest_sum_error for found in measured), LARGEST_ERROR, at_most=True),
    ]
    publish("secagg", columns, rows, figures, goals, as_json=options.json)
    return 0


def _row(case: Case, length: int, found: Figures) -> list[str]:
    how = "*" if found.sampled else ""
    return [
        f"{case.method} {case.clients} ({found.neighbours}), {length / 1e6:g}M, {case.dropped:.0%}{how}",
        f"{found.client_s:.3g}",
        f"{found.server_s:.3g}",
        f"{found.plain_server_s:.3g}",
        f"{found.sent_bytes / 1e6:.2f}",
        f"{found.received_bytes / 1e6:.3f}",
        f"{found.error_over_bound:.2f}",
    ]


def measure(case: Case, length: int, whole_bytes: float) -> Figures:
    """A whole round, or a short one and the parts that grow with the length."""
    masks = 2 if case.method == "ring" else shape(case)[0] + 1
    whole = case.clients * (masks + 2) * length * 4 <= whole_bytes
    played = play(case, length if whole else SHORT)
    client_s, server_s, sent = played.client_s, played.server_s, played.sent
    if not whole:
        vector = _Vector(played.terms, length)
        client_s += played.maskings * vector.client_s(played.client_masks)
        server_s += played.inputs * vector.input_s() + played.server_masks * vector.mask_s()
        sent += played.maskings * (length - SHORT) * played.terms.encoding.dtype.itemsize
    return Figures(
        neighbours=played.neighbours,
        client_s=client_s,
        server_s=server_s,
        plain_server_s=played.contributors * _plain_s(length),
        sent_bytes=sent,
        received_bytes=played.received,
        sent_over_plain=sent / (4 * length),
        largest_sum_error=played.error,
        error_over_bound=played.error / played.bound,
        sampled=not whole,
    )


def shape(case: Case) -> tuple[int, int]:
    """Neighbours and threshold."""
    if case.method == "SecAgg":
        others = case.clients - 1
        return others, others // 2 + 1
    return graph.choose(case.clients, corrupt=CORRUPT, dropped=max(case.dropped, 0.1))


@cache
def play(case: Case, length: int) -> Played:
    identities, members = _people(case.clients)
    common = {"label": secrets.token_hex(32), "members": members, "length": length, "clip": 0.1, "max_weight": 100}
    run = _play_ring if case.method == "ring" else _play_secagg
    return run(case, identities, common | {"largest_error": LARGEST_ERROR}, _updates(length))


def _play_secagg(
    case: Case, identities: list[Identity], common: dict[str, object], update: Callable[[int], tuple[Floats, int]]
) -> Played:
    neighbours, threshold = shape(case)
    terms = Terms.model_validate(common | {"neighbours": neighbours, "threshold": threshold})
    meter = Meter()
    played, made = play_round(terms, identities, update, {"mask": case.gone}, meter)
    there = len(made.contributors)
    return _played(case, terms, neighbours, meter, made, update, neighbours + 1, 1, there, there + played.pair_masks)


def _play_ring(
    case: Case, identities: list[Identity], common: dict[str, object], update: Callable[[int], tuple[Floats, int]]
) -> Played:
    terms = RingTerms.model_validate(common)
    meter = Meter()
    ring = Ring.of(terms, identities, meter)
    there = [number for number in range(case.clients) if number not in set(case.gone)]
    if case.gone:
        try:
            ring.attempt(range(case.clients), update, drop=case.gone)
        except TooFewLeft:
            made = ring.attempt(there, update)
    else:
        made = ring.attempt(there, update)
    maskings = 2 if case.gone else 1
    return _played(case, terms, 2, meter, made, update, 2, maskings, maskings * len(there), 0)


def _played(
    case: Case,
    terms: SumTerms,
    neighbours: int,
    meter: Meter,
    made: MaskedSum,
    update: Callable[[int], tuple[Floats, int]],
    client_masks: int,
    maskings: int,
    inputs: int,
    server_masks: int,
) -> Played:
    error, bound = off_by(terms, made, update)
    there = made.contributors
    return Played(
        terms=terms,
        neighbours=neighbours,
        client_s=statistics.median(meter.seconds[client] for client in there),
        server_s=meter.seconds[SERVER],
        sent=statistics.median(meter.sent[client] for client in there),
        received=statistics.median(meter.received[client] for client in there),
        contributors=len(there),
        inputs=inputs,
        client_masks=client_masks,
        maskings=maskings,
        server_masks=server_masks,
        error=error,
        bound=bound,
    )


class _Vector:
    """What grows with the length, by itself, with fresh keys; seconds."""

    def __init__(self, terms: SumTerms, length: int) -> None:
        self.encoding = terms.encoding
        self.values, _ = _updates(length)(0)
        self.words = self.encoding.encode(self.values, 1)

    def client_s(self, masks: int) -> float:
        """Encoding and masking one update."""

        def once() -> None:
            add_masks(self.encoding.encode(self.values, 50), _masks(masks))

        return _median_s(once)

    def input_s(self) -> float:
        """Adding one client's words."""
        total = np.zeros_like(self.words)

        def once() -> None:
            np.add(total, self.words, out=total)

        return _median_s(once)

    def mask_s(self) -> float:
        """Taking off one mask, of many."""
        return _median_s(lambda: add_masks(self.words, _masks(SAMPLED_MASKS))) / SAMPLED_MASKS


def _masks(count: int) -> list[Mask]:
    return [Mask(secrets.token_bytes(32), (1, -1)[place % 2]) for place in range(count)]


def _median_s(once: Callable[[], None]) -> float:
    seconds = []
    for _ in range(SAMPLED_CLIENTS):
        began = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


@cache
def _plain_s(length: int) -> float:
    """Adding one float32 vector in float64."""
    values, _ = _updates(length)(0)
    total = np.zeros(length)

    def once() -> None:
        np.add(total, values, out=total)

    return _median_s(once)


@cache
def _people(clients: int) -> tuple[list[Identity], tuple[Member, ...]]:
    return people(clients)


def _updates(length: int) -> Callable[[int], tuple[Floats, int]]:
    """A client's update and weight; one draw, rolled, since drawing anew would take longer than masking."""
    drawn = _drawn(length)
    return lambda client: (np.roll(drawn, 7 * client), 1 + client * 37 % 100)


@cache
def _drawn(length: int) -> Floats:
    values: Floats = np.random.default_rng(0).standard_normal(length, np.float32) * np.float32(0.02)
    return values


if __name__ == "__main__":
    sys.exit(main())
