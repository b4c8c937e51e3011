"""What a crowd counts, as plain numbers that travel as JSON."""

from collections import Counter
from typing import Any

from loadtest.durations import Durations

KINDS = ("forward", "backward", "evaluate")


class Counts:
    """Since the last `take`: sums by name, errors by code, latencies by kind of request."""

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.latencies = {kind: Durations() for kind in KINDS}

    def add(self, other: "Counts") -> None:
        self.sums.update(other.sums)
        self.errors.update(other.errors)
        for kind, durations in other.latencies.items():
            self.latencies[kind].merge(durations)

    def take(self) -> "Counts":
        """What was counted, and begin anew."""
        taken = Counts()
        for name in ("sums", "errors", "latencies"):
            fresh = getattr(taken, name)
            setattr(taken, name, getattr(self, name))
            setattr(self, name, fresh)
        return taken

    def to_json(self) -> dict[str, Any]:
        latencies = {kind: dict(durations.buckets) for kind, durations in self.latencies.items()}
        return {"sums": dict(self.sums), "errors": dict(self.errors), "latencies": latencies}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Counts":
        counts = cls()
        counts.sums.update(values["sums"])
        counts.errors.update(values["errors"])
        for kind, buckets in values["latencies"].items():
            counts.latencies[kind] = Durations({int(bucket): count for bucket, count in buckets.items()})
        return counts
