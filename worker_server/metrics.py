"""The server's numbers for those who watch it."""

import time
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.monitoring import refusals
from worker_server.service import PURPOSES, Service

# What the service counts of updates and their masked sums.
OF_UPDATES = {
    "updates_bounded": "Updates scaled down to aggregation.max_update_norm.",
    "sums_failed": "Masked sums of updates that came to nothing.",
    "wrong_shares": "Clients whose shares in a masked sum were not those dealt to them, and were left out.",
}


class ServerMetrics(Collector):
    """`flglm_server_…`, read off the state when asked for; labels are directions and codes of refusals."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterable[Metric]:
        sessions, rounds = list(self.service.sessions), self.service.rounds
        gauges = {
            "sessions": ("Open sessions.", len(sessions)),
            "round": ("Completed rounds.", rounds.round),
            "rounds_left": ("Rounds of the job not yet completed.", rounds.plan.rounds - rounds.round),
            "queue_requests": ("Requests not yet answered.", sum(len(session.unanswered) for session in sessions)),
            "brokers": ("Brokers that answer.", sum(connection.up for connection in self.service.brokers.connections)),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"flglm_server_{name}", text, value=value)
        yield from self._checkpoint_age()
        counted = self.service.metrics.counters.copy()
        cohorts = CounterMetricFamily("flglm_server_cohorts", "Forwards of the trunk.", labels=["purpose"])
        for purpose in PURPOSES.values():
            cohorts.add_metric([purpose], self.service.metrics.cohorts[purpose])
        yield cohorts
        yield CounterMetricFamily("flglm_server_cohort_tokens", "Tokens in them.", value=counted["tokens"])
        yield CounterMetricFamily(
            "flglm_server_compute_seconds", "Time the trunk was busy.", value=counted["microseconds"] / 1e6
        )
        passed = CounterMetricFamily("flglm_server_bytes", "Sealed bytes of sessions.", labels=["direction"])
        passed.add_metric(["up"], sum(connection.bytes_received for connection in self.service.brokers.connections))
        passed.add_metric(["down"], sum(connection.bytes_sent for connection in self.service.brokers.connections))
        yield passed
        for name, text in OF_UPDATES.items():
            yield CounterMetricFamily(f"flglm_server_{name}", text, value=self.service.counters[name])
        yield refusals("flglm_server_refusals", "Messages and sessions refused.", self.service.counters.copy())

    def _checkpoint_age(self) -> Iterable[Metric]:
        kept_at = self.service.engine.progress.kept_at
        if kept_at is not None:
            text = "Since the last checkpoint was written, or read at the start."
            age = time.monotonic() - kept_at
            yield GaugeMetricFamily("flglm_server_checkpoint_age_seconds", text, value=age)
