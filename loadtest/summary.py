"""From samples to figures."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from loadtest.counts import KINDS, Counts
from loadtest.measure import Sample
from loadtest.plan import Plan

MB = 10**6
ROLES = ("broker", "server", "crowd")
Reading = Callable[[Sample], float]


def summarise(plan: Plan, samples: Sequence[Sample]) -> dict[str, Any]:
    """The figures of a load test; rates and latencies of the measured time, errors and refusals of the whole run."""
    measured = [sample for sample in samples if sample.measured] or samples[-1:]
    whole, counts = Counts(), Counts()
    for sample in samples:
        whole.add(sample.counts)
    for sample in measured:
        counts.add(sample.counts)
    seconds = sum(sample.span_s for sample in measured)
    cores = {role: _cores(samples, measured, role) for role in ROLES}
    sums = counts.sums
    return {
        "clients": max(sample.sessions for sample in samples),
        "clients_asked_for": plan.clients,
        "errors": whole.errors.total(),
        "errors_by_code": dict(whole.errors.most_common()),
        "seconds": seconds,
        "throughput": {
            "requests_per_s": sums["requests"] / seconds,
            "steps_per_s": sums["steps"] / seconds,
            "tokens_per_s": sums["tokens"] / seconds,
            "mb_per_s": (sums["bytes_up"] + sums["bytes_down"]) / MB / seconds,
        },
        "latencies": {kind: counts.latencies[kind].summary() for kind in KINDS},
        "cohorts": _cohorts(samples[-1].server),
        "queue": {
            "mean": _mean(measured, lambda sample: sample.server["flglm_server_queue_requests"]),
            "max": max(sample.server["flglm_server_queue_requests"] for sample in measured),
        },
        "wait_s_mean": _ratio(samples[-1].server, "flglm_server_wait_seconds_sum", "flglm_server_wait_seconds_count"),
        "memory_mb": {role: _memory(samples, measured, role) for role in ROLES},
        "cpu_cores": cores,
        "busiest": max(cores, key=lambda role: cores[role]),
        "refusals": {
            "broker": _refusals(samples[-1].broker, "broker"),
            "server": _refusals(samples[-1].server, "server"),
        },
        "malicious_messages": whole.sums["malicious_messages"],
        "departures": whole.sums["departures"],
        "plan": plan.model_dump(),
    }


def memory_mb(sample: Sample, role: str) -> float:
    if role == "crowd":
        return sample.crowd["memory_bytes"] / MB
    return _of(sample, role)["process_resident_memory_bytes"] / MB


def cpu_s(sample: Sample, role: str) -> float:
    return sample.crowd["cpu_s"] if role == "crowd" else _of(sample, role)["process_cpu_seconds_total"]


def _of(sample: Sample, role: str) -> dict[str, float]:
    return sample.broker if role == "broker" else sample.server


def _cores(samples: Sequence[Sample], measured: Sequence[Sample], role: str) -> float:
    """How many cores a role kept busy while it was measured."""
    before = samples[max(0, samples.index(measured[0]) - 1)]
    return (cpu_s(measured[-1], role) - cpu_s(before, role)) / sum(sample.span_s for sample in measured)


def _memory(samples: Sequence[Sample], measured: Sequence[Sample], role: str) -> dict[str, float]:
    """When nobody had come yet, when measuring began, at the end, and the most that a sample saw."""
    readings = [memory_mb(sample, role) for sample in samples]
    return {
        "empty": readings[0],
        "start": memory_mb(measured[0], role),
        "end": readings[-1],
        "peak": max(readings),
    }


def _mean(samples: Sequence[Sample], reading: Reading) -> float:
    return sum(map(reading, samples)) / len(samples)


def _ratio(metrics: dict[str, float], total: str, count: str) -> float:
    return metrics.get(total, 0.0) / max(1.0, metrics.get(count, 0.0))


def _cohorts(server: dict[str, float]) -> dict[str, Any]:
    """How many forwards, requests in each on average, and how many had up to so many."""
    prefix = "flglm_server_cohort_requests"
    edges = [(float(key.split('"')[1]), count) for key, count in server.items() if key.startswith(f"{prefix}_bucket")]
    sizes: dict[str, int] = {}
    before = 0.0
    for edge, cumulated in sorted(edges):
        sizes[f"{edge:.0f}" if math.isfinite(edge) else "more"] = round(cumulated - before)
        before = cumulated
    return {
        "count": round(server.get(f"{prefix}_count", 0)),
        "mean_requests": _ratio(server, f"{prefix}_sum", f"{prefix}_count"),
        "sizes": sizes,
    }


def _refusals(metrics: dict[str, float], role: str) -> dict[str, int]:
    prefix = f"flglm_{role}_refusals_total"
    return {key.split('"')[1]: round(count) for key, count in metrics.items() if key.startswith(f"{prefix}{{")}
