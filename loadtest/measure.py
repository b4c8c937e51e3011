"""Running a load test: processes, a sample a second, until its time is over."""

import json
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.cluster import Cluster
from launcher.local_run import free_port
from launcher.scrape import scrape
from loadtest.counts import Counts
from loadtest.plan import Plan
from loadtest.scene import crowd_words, make_scene, words
from shared.errors import DeadlineExceeded

READY_S = 120.0
# How long after the ramp the first round may take to begin; then it is measured what there is.
BEGIN_S = 30.0
SAMPLE_S = 1.0
# One thread each: more would fight for the cores.
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Sample:
    """A second, `at` so many since the first client came. `states`: honest clients by what they do."""

    at: float
    measured: bool
    span_s: float
    counts: Counts
    sessions: int
    states: Counter[str]
    broker: dict[str, float]
    server: dict[str, float]
    crowd: dict[str, float]


Observe = Callable[[Sample], None]


@dataclass
class _Heard:
    """What the processes of the crowd said last, and what they have counted since the last sample."""

    latest: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    def take(self, name: str, event: dict[str, Any]) -> None:
        if event.get("event") == "crowd":
            self.latest[name] = event
            self.counts.add(Counts.from_json(event["counts"]))

    @property
    def sessions(self) -> int:
        return sum(event["sessions"] for event in self.latest.values())

    @property
    def states(self) -> Counter[str]:
        states: Counter[str] = Counter()
        for event in self.latest.values():
            states.update(event["states"])
        return states

    @property
    def crowd(self) -> dict[str, float]:
        return {key: sum(event[key] for event in self.latest.values()) for key in ("memory_bytes", "cpu_s")}


def measure(plan: Plan, folder: Path, model: str | None, server_threads: int, observe: Observe) -> list[Sample]:
    """All samples, the ramp's included. Raises RoleFailed if a process dies, DeadlineExceeded, UsageError."""
    make_scene(plan, folder, model)
    plan_file = folder / "plan.json"
    plan_file.write_text(plan.model_dump_json(indent=1))
    roles = words(plan, folder, server_threads)
    watched = {name: f"127.0.0.1:{free_port()}" for name in roles}
    samples: list[Sample] = []
    with Cluster(folder / "logs", THREADS) as cluster:
        broker = cluster.start("broker", "broker", [*roles["broker"], "--metrics-address", watched["broker"]])
        address = cluster.wait_for(broker, "ready", READY_S)["clients"]
        cluster.start("server", "server", [*roles["server"], "--metrics-address", watched["server"]])
        _wait_until_ready(cluster, watched["server"])
        for first in range(plan.processes):
            cluster.start("crowd", f"crowd-{first}", crowd_words(plan_file, folder, address, first))
        began, measuring_since, heard = time.monotonic(), None, _Heard()
        previous = began
        while measuring_since is None or time.monotonic() - measuring_since < plan.seconds:
            for role, event in cluster.events(0.1):
                heard.take(role.name, event)
            cluster.check()
            now = time.monotonic()
            if now - previous < SAMPLE_S or len(heard.latest) < plan.processes:
                if now - began > plan.ramp_s + READY_S and not heard.latest:
                    raise DeadlineExceeded("the simulated clients do not start", hint=f"see {folder / 'logs'}")
                continue
            counts, heard.counts = heard.counts, Counts()
            sample = Sample(
                now - began,
                measuring_since is not None,
                now - previous,
                counts,
                heard.sessions,
                heard.states,
                scrape(watched["broker"]),
                scrape(watched["server"]),
                heard.crowd,
            )
            samples.append(sample)
            observe(sample)
            previous = now
            ramped = now - began >= plan.ramp_s
            if measuring_since is None and ramped and (heard.states["training"] or now > began + plan.ramp_s + BEGIN_S):
                measuring_since = now
    return samples


def _wait_until_ready(cluster: Cluster, address: str) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        cluster.check()
        try:
            with urllib.request.urlopen(f"http://{address}/ready", timeout=5) as answer:
                json.loads(answer.read())
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise DeadlineExceeded(f"the server was not ready after {READY_S:g} s")
