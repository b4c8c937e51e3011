"""The broker's numbers for those who watch it, read off its state when they are asked for."""

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from broker.routing import Router
from broker.throttle import Throttle
from shared.monitoring import refusals


class BrokerMetrics(Collector):
    """`flglm_broker_…`; labels are sides, directions and codes of refusals, of which there are a fixed number."""

    def __init__(self, router: Callable[[], Router], throttle: Throttle[Any]) -> None:
        self.router = router
        self.throttle = throttle

    def collect(self) -> Iterable[Metric]:
        router = self.router()
        counters, peers = router.counters.copy(), list(router.peers)
        connected = GaugeMetricFamily("flglm_broker_peers", "Greeted connections.", labels=["side"])
        for side in ("client", "server"):
            connected.add_metric([side], sum(peer.side == side for peer in peers))
        yield connected
        yield GaugeMetricFamily("flglm_broker_sessions", "Open sessions.", value=len(router.sessions))
        yield GaugeMetricFamily(
            "flglm_broker_waiting_messages", "Messages of workers over their rate.", value=self.throttle.waiting
        )
        for what, text in (("messages", "End-to-end messages passed on."), ("bytes", "Their sealed bytes.")):
            passed = CounterMetricFamily(f"flglm_broker_{what}", text, labels=["direction"])
            for direction in ("up", "down"):
                passed.add_metric([direction], counters[f"{what}_{direction}"])
            yield passed
        yield CounterMetricFamily("flglm_broker_peers_gone", "Connections that ended.", value=counters["peers_gone"])
        yield refusals("flglm_broker_refusals", "Messages and peers refused.", counters)
