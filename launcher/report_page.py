"""The report as one HTML page without scripts: pictures first, a table, and the settings folded away."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from launcher.charts import BAR_ROW, Bar, BarGroup, Line, Point, bar_chart, line_chart
from launcher.html_page import html_page
from launcher.report_data import Curve, Process, Report, alone_text, bytes_text, duration_text, metric_text
from launcher.wire_picture import wire_picture

TEMPLATE = Path(__file__).with_name("report.html")
CLIENT_COLOURS = 7
POOLED_COLOUR = 7
# Thick bars for the few that matter most.
BOLD_ROW = 56
# A curve is shown as a running mean over this share of its points, and thinned to MOST_POINTS.
SMOOTHED_SHARE = 1 / 24
MOST_POINTS = 400


def page(report: Report) -> str:
    """The whole page. Every text from the report is escaped."""
    return html_page(
        report.title,
        TEMPLATE,
        title=escape(report.title),
        headline=_headline(report),
        summary=_summary(report),
        picture=wire_picture(
            list(report.by_client),
            up=bytes_text(report.wire_bytes["up"]),
            down=bytes_text(report.wire_bytes["down"]),
        ),
        tiles=_tiles(report),
        everyone=_everyone(report),
        own=_own(report),
        loss=_loss(report),
        smoothing=_smoothing(report),
        validation=_validation(report),
        metric=escape(report.quality.metric),
        better="Higher is better." if report.quality.higher_is_better else "Lower is better.",
        table=_quality_table(report),
        privacy=_privacy(report),
        processes=_process_table(report.processes),
        versions=_table(("package", "version"), sorted(report.versions.items())),
        job=escape(json.dumps(report.job, indent=2, ensure_ascii=False)),
    )


# Words


def _headline(report: Report) -> str:
    quality = report.quality
    joint = metric_text(quality.metric, quality.joint)
    headline = f'Together <em class="together">{joint}</em>.'
    if quality.alone:
        best = metric_text(quality.metric, quality.best_alone())
        headline += f'<br>Alone <em class="alone">{best}</em>' + (" at best." if len(quality.alone) > 1 else ".")
    return headline


def _summary(report: Report) -> str:
    quality = report.quality
    pooled = metric_text(quality.metric, quality.centralised)
    return (
        f"{escape(quality.metric.capitalize())} on everyone&rsquo;s validation rows. {len(report.by_client)} clients "
        f"trained one model, its middle blocks on a server, and no row left its owner. "
        f"One process that had all rows in one place reaches {pooled}."
    )


def _tiles(report: Report) -> str:
    failed = sum(process.exit_code != 0 for process in report.processes)
    tiles = [
        (f"{report.tokens_per_s:,.0f}", "tokens a second"),
        (duration_text(report.seconds), "of joint training"),
        (f"{report.steps:,}", f"steps in {report.rounds:,} rounds"),
        (bytes_text(report.wire_bytes["up"]), "sealed, to the server"),
        (bytes_text(report.wire_bytes["down"]), "sealed, back"),
        (str(len(report.processes)), f"processes, {failed} failed" if failed else "processes ended well"),
    ]
    return "".join(f"<li><strong>{escape(value)}</strong><span>{escape(name)}</span></li>" for value, name in tiles)


# Pictures


def _everyone(report: Report) -> str:
    quality = report.quality
    alone = [Bar(name, value, "alone") for name, value in quality.alone.items()]
    both = [Bar("together", quality.joint, "together"), Bar("centralised", quality.centralised, "centralised")]
    groups = [BarGroup("each alone", alone)] if alone else []
    groups.append(BarGroup("all of them", both))
    return _bars(report, groups, f"{quality.metric} on all validation rows", BOLD_ROW)


def _own(report: Report) -> str:
    groups = [
        BarGroup(
            name,
            [
                Bar("alone", own.alone, "alone"),
                Bar("together", own.joint, "together"),
                Bar("centralised", own.centralised, "centralised"),
            ],
        )
        for name, own in report.by_client.items()
    ]
    return _bars(report, groups, f"{report.quality.metric} on each client's own validation rows", BAR_ROW)


def _bars(report: Report, groups: Sequence[BarGroup], title: str, row: float) -> str:
    metric = report.quality.metric
    description = "; ".join(
        f"{group.heading} {bar.label}: {metric_text(metric, bar.value)}" for group in groups for bar in group.bars
    )
    return bar_chart(
        groups,
        title=title,
        description=description,
        maximum=_highest(metric),
        row=row,
        format_value=lambda value: metric_text(metric, value),
    )


def _loss(report: Report) -> str:
    curves = [curve for curve in report.curves if curve.kind == "loss"]
    lines = [
        Line(_label(curve), thinned(smoothed(curve.points)), _colour(report, curve), curve.run == "alone")
        for curve in curves
    ]
    return line_chart(lines, title="Training loss by step", description=_ends(lines), x_label="step")


def _smoothing(report: Report) -> str:
    window = max((_window(curve.points) for curve in report.curves if curve.kind == "loss"), default=1)
    return f", mean of {window} steps" if window > 1 else ""


def _validation(report: Report) -> str:
    """Each client's curve, and dashed beside it what the client reaches alone."""
    metric = report.quality.metric
    curves = [curve for curve in report.curves if curve.kind == "validation"]
    lines = [Line(curve.name, curve.points, _colour(report, curve)) for curve in curves]
    for curve in curves:
        own = report.by_client.get(curve.name)
        if own is not None and curve.points:
            rounds = [x for x, _ in curve.points]
            alone = [(min(rounds), own.alone), (max(rounds), own.alone)]
            lines.append(Line(f"{curve.name}, alone", alone, _colour(report, curve), dashed=True))
    highest = _highest(metric)
    return line_chart(
        lines,
        title=f"{metric} by round",
        description=_ends(lines),
        x_label="round",
        y_range=None if highest is None else (0.0, highest),
        format_y=lambda value: f"{value:.0%}" if metric == "accuracy" else f"{value:.4g}",
    )


def _highest(metric: str) -> float | None:
    return 1.0 if metric == "accuracy" else None


def _label(curve: Curve) -> str:
    return f"{curve.name}, alone" if curve.run == "alone" else curve.name


def _colour(report: Report, curve: Curve) -> int:
    if curve.run == "centralised" or curve.name not in report.by_client:
        return POOLED_COLOUR
    return list(report.by_client).index(curve.name) % CLIENT_COLOURS


def _ends(lines: Iterable[Line]) -> str:
    """For who cannot see the chart: first and last value of each line."""
    return "; ".join(
        f"{line.label}: from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines if line.points
    )


def _window(points: Sequence[Point]) -> int:
    return max(1, round(len(points) * SMOOTHED_SHARE))


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Each y replaced by the mean of the last few, itself included."""
    window = _window(points)
    means = []
    for index, (x, _) in enumerate(points):
        recent = [y for _, y in points[max(0, index + 1 - window) : index + 1]]
        means.append((x, sum(recent) / len(recent)))
    return means


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about MOST_POINTS of the points, evenly chosen, the last among them."""
    stride = -(-len(points) // MOST_POINTS) or 1
    return list(points[::-stride])[::-1]


# Tables


def _quality_table(report: Report) -> str:
    quality = report.quality
    rows = [
        (name, *(metric_text(quality.metric, value) for value in (own.alone, own.joint, own.centralised)))
        for name, own in report.by_client.items()
    ]
    joint, centralised = (metric_text(quality.metric, value) for value in (quality.joint, quality.centralised))
    rows.append(("everyone", alone_text(quality), joint, centralised))
    return _table(("validation rows of", "alone", "together", "centralised"), rows)


def _privacy(report: Report) -> str:
    """A card of its own in a private job, nothing in others."""
    if not report.privacy:
        return ""
    rows = [
        (name, own.type, str(own.rounds), f"{own.epsilon:.4g}", f"{own.delta:g}")
        for name, own in report.privacy.items()
    ]
    return (
        '<section class="card wide numbers"><h2>Privacy of updates</h2>'
        "<p>Differential privacy of each client&rsquo;s whole updates, over its rounds. Hidden states and gradients "
        "that go to the server are not covered.</p>"
        f'<div class="scroll">{_table(("client", "noise", "rounds", "epsilon", "delta"), rows)}</div></section>'
    )


def _process_table(processes: Sequence[Process]) -> str:
    rows = [
        (process.role, process.name, str(process.pid), "" if process.exit_code is None else str(process.exit_code))
        for process in processes
    ]
    return _table(("role", "name", "process id", "exit code"), rows)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
