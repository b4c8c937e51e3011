"""Durations in buckets that are 2 % wide: percentiles of any number of them in bounded memory."""

import math
from collections import Counter
from collections.abc import Mapping

WIDTH = 1.02
SHORTEST_S = 1e-5


class Durations:
    """Adds up; `percentile` is right to 2 %."""

    def __init__(self, buckets: Mapping[int, int] | None = None) -> None:
        self.buckets: Counter[int] = Counter(buckets or {})

    def add(self, seconds: float) -> None:
        self.buckets[max(0, math.ceil(math.log(max(seconds, SHORTEST_S) / SHORTEST_S, WIDTH)))] += 1

    def merge(self, other: "Durations") -> None:
        self.buckets.update(other.buckets)

    @property
    def count(self) -> int:
        return self.buckets.total()

    def percentile(self, share: float) -> float | None:
        """The duration that `share` of all (0 to 1) do not exceed, in seconds; None if there are none."""
        due = share * self.count
        for bucket in sorted(self.buckets):
            due -= self.buckets[bucket]
            if due <= 1e-9:
                return float(SHORTEST_S * WIDTH**bucket)
        return None

    def summary(self) -> dict[str, float | int | None]:
        percentiles = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
        return {"count": self.count, **{name: self.percentile(share) for name, share in percentiles.items()}}
