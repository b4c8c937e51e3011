"""What is counted as cohorts are computed."""

from collections import Counter
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Histogram

REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class CohortMetrics:
    """Sizes and waits as histograms of `registry`; forwards by purpose in `cohorts`, other sums in `counters`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Histogram(
            "flglm_server_cohort_requests", "Requests in one forward.", buckets=REQUESTS, registry=registry
        )
        self.wait = Histogram(
            "flglm_server_wait_seconds",
            "From a request's arrival to the start of its cohort.",
            buckets=SECONDS,
            registry=registry,
        )
        self.counters: Counter[str] = Counter()
        self.cohorts: Counter[str] = Counter()

    def forward(self, purpose: str, tokens: Sequence[int]) -> None:
        """A cohort was computed: what for, and the tokens of each request."""
        self.requests.observe(len(tokens))
        self.cohorts[purpose] += 1
        self.counters["tokens"] += sum(tokens)

    def computed(self, waits: Sequence[float], seconds: float) -> None:
        for wait in waits:
            self.wait.observe(wait)
        self.counters["microseconds"] += round(seconds * 1e6)
