"""What broker and server do right now, from two looks at their metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from shared.errors import ConnectionFailed

MB = 10**6
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Look:
    """One look at a role: when (monotonic, s), and what it said; or why it said nothing."""

    address: str
    at: float
    metrics: Metrics
    trouble: str = ""


def missed(address: str, at: float, error: ConnectionFailed) -> Look:
    return Look(address, at, {}, error.message)


def figures(before: Look, now: Look) -> dict[str, float | str]:
    """What a person wants to know of a role, rates since the look before."""
    if now.trouble:
        return {"trouble": now.trouble}
    role = "server" if any(key.startswith("flglm_server_") for key in now.metrics) else "broker"
    return (_server if role == "server" else _broker)(before, now) | _process(before, now)


def _broker(before: Look, now: Look) -> dict[str, float | str]:
    prefix = "flglm_broker"
    return {
        "role": "broker",
        "sessions": now.metrics[f"{prefix}_sessions"],
        "clients": now.metrics[f'{prefix}_peers{{side="client"}}'],
        "servers": now.metrics[f'{prefix}_peers{{side="server"}}'],
        "messages_per_s": _rate(before, now, f"{prefix}_messages_total"),
        "mb_per_s": _rate(before, now, f"{prefix}_bytes_total") / MB,
        "held_back": now.metrics[f"{prefix}_waiting_messages"],
        "refusals_per_s": _rate(before, now, f"{prefix}_refusals_total"),
    }


def _server(before: Look, now: Look) -> dict[str, float | str]:
    prefix = "flglm_server"
    return {
        "role": "server",
        "sessions": now.metrics[f"{prefix}_sessions"],
        "rounds": now.metrics[f"{prefix}_round"],
        "queue": now.metrics[f"{prefix}_queue_requests"],
        "cohorts_per_s": _rate(before, now, f"{prefix}_cohorts_total"),
        "requests_per_cohort": _mean(before, now, f"{prefix}_cohort_requests"),
        "wait_ms": 1000 * _mean(before, now, f"{prefix}_wait_seconds"),
        "tokens_per_s": _rate(before, now, f"{prefix}_cohort_tokens_total"),
        "trunk_busy": _rate(before, now, f"{prefix}_compute_seconds_total"),
        "mb_per_s": _rate(before, now, f"{prefix}_bytes_total") / MB,
        "refusals_per_s": _rate(before, now, f"{prefix}_refusals_total"),
        "checkpoint_age_s": now.metrics.get(f"{prefix}_checkpoint_age_seconds", 0.0),
    }


def _process(before: Look, now: Look) -> dict[str, float | str]:
    return {
        "cores": _rate(before, now, "process_cpu_seconds_total"),
        "memory_mb": now.metrics.get("process_resident_memory_bytes", 0.0) / MB,
    }


def table(shown: Sequence[tuple[Look, Mapping[str, float | str]]]) -> Table:
    """A column a role."""
    made = Table(title="flglm top", title_justify="left")
    made.add_column("")
    for look, _ in shown:
        made.add_column(look.address, justify="right")
    names = list(dict.fromkeys(name for _, values in shown for name in values))
    for name in names:
        made.add_row(name.replace("_per_s", "/s").replace("_", " "), *(_cell(values.get(name)) for _, values in shown))
    return made


def _cell(value: float | str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value == int(value) or value >= 100 else f"{value:,.2f}"


def _total(metrics: Metrics, name: str) -> float:
    """Over all labels."""
    return sum(value for key, value in metrics.items() if key == name or key.startswith(f"{name}{{"))


def _grown(before: Look, now: Look, name: str) -> float:
    """A role that was started again counts from 0. Nothing is known after a look that found nobody."""
    if before.trouble:
        return 0.0
    earlier, later = _total(before.metrics, name), _total(now.metrics, name)
    return later - earlier if later >= earlier else later


def _rate(before: Look, now: Look, name: str) -> float:
    return _grown(before, now, name) / max(1e-9, now.at - before.at)


def _mean(before: Look, now: Look, name: str) -> float:
    return _grown(before, now, f"{name}_sum") / max(1.0, _grown(before, now, f"{name}_count"))
