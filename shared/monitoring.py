"""What a role tells those who watch it, over HTTP: `/metrics` for Prometheus, `/health` and `/ready` for supervisors.

Numbers only: no names of clients, no losses, nothing that was sealed. One request at a time, each with a deadline, so
that nobody can occupy the role through it.
"""

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily

from shared.errors import ConnectionFailed, UsageError

# A serving loop that has not come round for so long hangs.
LONGEST_TURN_S = 30.0
REQUEST_S = 5.0
STOP_POLL_S = 0.1
# What a role calls its counters of refusals, before the code.
REFUSED = "refused_"


@dataclass
class Health:
    """`ready`: whether the role serves. Its loop calls `beat()` each time round, once it has begun."""

    ready: bool = False
    beaten_at: float | None = None

    def beat(self, now: float) -> None:
        self.beaten_at = now

    def alive(self, now: float) -> bool:
        return self.beaten_at is None or now - self.beaten_at < LONGEST_TURN_S


def new_registry() -> CollectorRegistry:
    """With memory, CPU time and open files of this process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def refusals(name: str, text: str, counters: Mapping[str, int]) -> CounterMetricFamily:
    """Those of a role's `counters` that count refusals, as `name` by code."""
    refused = CounterMetricFamily(name, text, labels=["code"])
    for counter, count in counters.items():
        if counter.startswith(REFUSED):
            refused.add_metric([counter.removeprefix(REFUSED)], count)
    return refused


@contextmanager
def monitored(address: str | None, registry: CollectorRegistry, health: Health) -> Iterator[str | None]:
    """Serve at `address` ("host:port"; port 0 finds one) in a thread; yields where. None: serve nothing.

    Raises UsageError for what is no address, ConnectionFailed if it cannot be bound.
    """
    if address is None:
        yield None
        return
    host, port = split_address(address)
    try:
        server = WSGIServer((host, port), _Handler)
    except OSError as error:
        raise ConnectionFailed(
            f"cannot listen on {address} for monitoring: {error.strerror}",
            hint="stop what uses it, or give another --metrics-address",
        ) from None
    server.set_app(_application(registry, health))
    thread = threading.Thread(target=server.serve_forever, args=(STOP_POLL_S,), name="monitoring", daemon=True)
    thread.start()
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def split_address(address: str) -> tuple[str, int]:
    """Host and port. Raises UsageError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise UsageError(f"{address!r} is no address to be watched at", hint="host:port, such as 127.0.0.1:9464")
    return host.strip("[]"), int(port)


def _application(registry: CollectorRegistry, health: Health) -> WSGIApplication:
    metrics: WSGIApplication = make_wsgi_app(registry)

    def answer(environment: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        match environment.get("PATH_INFO"):
            case "/metrics":
                return metrics(environment, start)
            case "/health":
                return _say(start, health.alive(time.monotonic()), "ok", "the serving loop hangs")
            case "/ready":
                ready = health.ready and health.alive(time.monotonic())
                return _say(start, ready, "ready", "not serving yet, or no more")
            case _:
                start("404 Not Found", [("Content-Type", "text/plain")])
                return [b"/metrics, /health, /ready\n"]

    return answer


def _say(start: StartResponse, well: bool, yes: str, no: str) -> list[bytes]:
    start("200 OK" if well else "503 Service Unavailable", [("Content-Type", "application/json")])
    return [json.dumps({"status": yes if well else no}).encode() + b"\n"]


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_S

    def log_message(self, format: str, *args: Any) -> None:
        """A line a scrape would drown the rest."""
