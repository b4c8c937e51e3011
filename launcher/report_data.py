"""The numbers of a finished run, as report.json holds them, and how they are written for people."""

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quality(Part):
    """The metric on the union of all clients' validation rows; `alone` by the client that trained alone."""

    metric: str
    higher_is_better: bool
    joint: float
    centralised: float
    alone: dict[str, float]

    def best_alone(self) -> float:
        """NaN if nobody trained alone."""
        known = [value for value in self.alone.values() if math.isfinite(value)]
        return (max if self.higher_is_better else min)(known, default=math.nan)


class ClientQuality(Part):
    """The metric on one client's own validation rows, by how the model was trained."""

    joint: float
    alone: float
    centralised: float


class ClientPrivacy(Part):
    """What a private job cost one client: `epsilon` at `delta`, its whole update of a round being the unit."""

    type: str
    rounds: int
    epsilon: float
    delta: float


class Curve(Part):
    """A series: `loss` by step, or the metric on the client's validation rows by round (`validation`).

    `name` is a client's, or what the centralised run is called; `run` is the training that it shows.
    """

    name: str
    kind: Literal["loss", "validation"]
    points: list[tuple[float, float]]
    run: Literal["together", "alone", "centralised"] = "together"


class Process(Part):
    role: str
    name: str
    pid: int
    exit_code: int | None


class Report(Part):
    """`wire_bytes`: `up` is towards the server. `seconds`: of the joint run. `job`: the resolved settings.

    `privacy`: by client, in a job that has any.
    """

    title: str
    metric: str
    quality: Quality
    by_client: dict[str, ClientQuality]
    privacy: dict[str, ClientPrivacy] = {}
    curves: list[Curve]
    tokens_per_s: float
    wire_bytes: dict[Literal["up", "down"], int]
    rounds: int
    steps: int
    seconds: float
    processes: list[Process]
    job: dict[str, Any]
    versions: dict[str, str]


def metric_text(metric: str, value: float) -> str:
    """An accuracy as a percentage, anything else with three decimals; "n/a" if not finite."""
    if not math.isfinite(value):
        return "n/a"
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.3f}"


def alone_text(quality: Quality) -> str:
    """From the worst to the best that trained alone."""
    known = sorted(value for value in quality.alone.values() if math.isfinite(value))
    if not known:
        return "n/a"
    low, high = metric_text(quality.metric, known[0]), metric_text(quality.metric, known[-1])
    return low if low == high else f"{low} to {high}"


def bytes_text(count: int) -> str:
    """In decimal units: 12.3 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration_text(seconds: float) -> str:
    """12.3 s, 94 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 20:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
