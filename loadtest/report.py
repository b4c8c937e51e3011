"""A load test's outcome in words, as JSON and as a page."""

import json
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from launcher.charts import Bar, BarGroup, Line, bar_chart, line_chart
from launcher.html_page import html_page
from loadtest.measure import Sample
from loadtest.summary import ROLES, memory_mb

TEMPLATE = Path(__file__).with_name("page.html")
STATES = ("training", "waiting", "connecting", "away")
PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def event_of(sample: Sample) -> dict[str, Any]:
    """A sample as one JSON line."""
    return {
        "event": "second",
        "at": sample.at,
        "measured": sample.measured,
        "sessions": sample.sessions,
        "states": dict(sample.states),
        "requests_per_s": sample.counts.sums["requests"] / sample.span_s,
        "latencies": {kind: durations.summary() for kind, durations in sample.counts.latencies.items()},
        "queue": sample.server["flglm_server_queue_requests"],
        "memory_mb": {role: memory_mb(sample, role) for role in ROLES},
        "errors": dict(sample.counts.errors),
    }


def describe_in_words(summary: dict[str, Any], out: Path | None) -> str:
    """A few lines for people."""
    forward, backward = summary["latencies"]["forward"], summary["latencies"]["backward"]
    throughput, memory = summary["throughput"], summary["memory_mb"]
    cores = ", ".join(f"{role} {busy:.2f}" for role, busy in summary["cpu_cores"].items())
    lines = [
        f"{summary['clients']:,} of {summary['clients_asked_for']:,} clients connected at once, "
        f"{summary['errors']:,} errors{_by_code(summary['errors_by_code'])}",
        f"requests     {throughput['requests_per_s']:,.0f}/s, {throughput['tokens_per_s']:,.0f} tokens/s, "
        f"{throughput['mb_per_s']:,.1f} MB/s",
        f"forward      p50 {_ms(forward['p50'])}, p95 {_ms(forward['p95'])}, p99 {_ms(forward['p99'])}",
        f"backward     p50 {_ms(backward['p50'])}, p95 {_ms(backward['p95'])}, p99 {_ms(backward['p99'])}",
        f"cohorts      {summary['cohorts']['count']:,}, {summary['cohorts']['mean_requests']:.1f} requests each",
        f"queue        {summary['queue']['mean']:,.0f} requests on average, {summary['queue']['max']:,.0f} at most",
        "memory       " + ", ".join(f"{role} {memory[role]['peak']:,.0f} MB" for role in ROLES),
        f"busy cores   {cores}; {summary['busiest']} breaks first",
    ]
    return "\n".join(lines + ([] if out is None else [f"report       {out / 'report.html'} (and report.json)"]))


def write_report(summary: dict[str, Any], samples: Sequence[Sample], out: Path) -> None:
    """`report.json` (the summary, and every second) and `report.html`."""
    document = summary | {"seconds_measured": [event_of(sample) for sample in samples]}
    (out / "report.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    (out / "report.html").write_text(page(summary, samples), encoding="utf-8")


def page(summary: dict[str, Any], samples: Sequence[Sample]) -> str:
    """One page without scripts."""
    forward = summary["latencies"]["forward"]
    return html_page(
        "load test",
        TEMPLATE,
        seconds=f"{summary['seconds']:.0f} seconds",
        headline=f'<em class="together">{summary["clients"]:,}</em> clients, {summary["errors"]:,} errors.',
        summary=escape(
            "Simulated clients without a model, with real keys, handshakes and seals, on a real broker and server. "
            f"The {summary['busiest']} was the busiest part."
        ),
        tiles=_tiles(summary),
        requests=_over_time("requests a second", samples, {"requests": _requests}),
        latency=_over_time(
            f"forward latency; over the whole time p50 {_ms(forward['p50'])}, p99 {_ms(forward['p99'])}",
            samples,
            {name: _forward_ms(share) for name, share in PERCENTILES.items()},
        ),
        clients=_over_time("clients", samples, {state: _in_state(state) for state in STATES}),
        memory=_over_time("memory in MB", samples, {role: _memory(role) for role in ROLES}),
        cohorts=_bars("cohorts by size", {edge: count for edge, count in summary["cohorts"]["sizes"].items() if count}),
        cores=_bars("busy cores", summary["cpu_cores"]),
        refusals=_refusals(summary),
        plan=escape(json.dumps(summary["plan"], indent=2)),
    )


Reading = Callable[[Sample], float]


def _requests(sample: Sample) -> float:
    return sample.counts.sums["requests"] / sample.span_s


def _forward_ms(share: float) -> Reading:
    return lambda sample: 1000 * (sample.counts.latencies["forward"].percentile(share) or float("nan"))


def _in_state(state: str) -> Reading:
    return lambda sample: sample.states[state]


def _memory(role: str) -> Reading:
    return lambda sample: memory_mb(sample, role)


def _over_time(title: str, samples: Sequence[Sample], readings: dict[str, Reading]) -> str:
    lines = [
        Line(name, [(sample.at, reading(sample)) for sample in samples], colour)
        for colour, (name, reading) in enumerate(readings.items())
    ]
    return line_chart(lines, title=title, description=title, x_label="seconds since the first client came")


def _bars(title: str, values: dict[str, float]) -> str:
    bars = [Bar(name, value, "together") for name, value in values.items()]
    return bar_chart([BarGroup("", bars)], title=title, description=title)


def _tiles(summary: dict[str, Any]) -> str:
    throughput, forward = summary["throughput"], summary["latencies"]["forward"]
    tiles = [
        (f"{throughput['requests_per_s']:,.0f}", "requests a second"),
        (f"{throughput['tokens_per_s']:,.0f}", "tokens a second"),
        (f"{throughput['mb_per_s']:,.1f} MB", "of tensors a second"),
        (_ms(forward["p50"]), "forward, median"),
        (_ms(forward["p99"]), "forward, 99 %"),
        (f"{summary['cohorts']['mean_requests']:.1f}", "requests in a cohort"),
    ]
    return "".join(f"<li><strong>{escape(value)}</strong><span>{escape(name)}</span></li>" for value, name in tiles)


def _refusals(summary: dict[str, Any]) -> str:
    rows = [("honest clients", code, count) for code, count in summary["errors_by_code"].items()]
    for role, refusals in summary["refusals"].items():
        rows += [(role, code, count) for code, count in sorted(refusals.items(), key=lambda item: -item[1])]
    if not rows:
        return "<p>Nothing.</p>"
    body = "".join(
        f"<tr><td>{escape(where)}</td><td>{escape(code)}</td><td>{count:,}</td></tr>" for where, code, count in rows
    )
    return f"<table><thead><tr><th>where</th><th>code</th><th>count</th></tr></thead><tbody>{body}</tbody></table>"


def _ms(seconds: float | None) -> str:
    return "n/a" if seconds is None else f"{1000 * seconds:,.0f} ms"


def _by_code(errors: dict[str, int]) -> str:
    return " (" + ", ".join(f"{count} {code}" for code, count in errors.items()) + ")" if errors else ""
