"""Charts as inline SVG: pure functions from numbers to markup, no script, all text escaped.

Colours are classes that the page styles, so that a chart follows its light or dark scheme: `c0` to `c7` for lines,
a bar's own `kind`. Values that are not finite are left out of lines; as bars they show as "n/a".
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from launcher.svg import WIDTH, extent, picture, plain, shortened, text, ticks

COLOURS = 8

Point = tuple[float, float]
Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """A named series; `colour` counts from 0 and repeats after COLOURS.

    A dashed line goes with the solid one of its colour, and is not in the legend.
    """

    label: str
    points: Sequence[Point]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    kind: str


@dataclass(frozen=True)
class BarGroup:
    """Bars under one heading (none if empty)."""

    heading: str
    bars: Sequence[Bar]


# Lines

LEFT, RIGHT, TOP, BOTTOM = 52, WIDTH - 12, 12, 232
LEGEND_TOP, LEGEND_ROW, LEGEND_MARK, LEGEND_GAP = BOTTOM + 66, 22, 26, 18
CHARACTER = 7.2  # estimated width


@dataclass(frozen=True)
class Axes:
    """Data to units of the picture: x from its lowest to its highest value, y from tick to tick."""

    x_from: float
    x_to: float
    y_ticks: list[float]

    def at(self, x: float, y: float) -> Point:
        across = (x - self.x_from) / (self.x_to - self.x_from)
        up = (y - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return LEFT + across * (RIGHT - LEFT), BOTTOM - min(1.0, max(0.0, up)) * (BOTTOM - TOP)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    description: str,
    x_label: str,
    y_range: tuple[float, float] | None = None,
    format_y: Format = plain,
) -> str:
    """Lines over a common x, with axes and a legend. `y_range` fixes the y axis; else it fits the values."""
    shown = [line for line in map(_finite, lines) if line.points]
    if not shown:
        return picture(title, description, 80, [text(WIDTH / 2, 44, "nothing to show", "tick", "middle")])
    x_from, x_to = extent([x for line in shown for x, _ in line.points])
    y_ticks = ticks(*(y_range or extent([y for line in shown for _, y in line.points])))
    axes = Axes(x_from, x_to, y_ticks)
    legend, bottom = _legend([line for line in shown if not line.dashed])
    frame = [*_grid(axes, format_y), text((LEFT + RIGHT) / 2, BOTTOM + 40, x_label, "axis", "middle")]
    return picture(title, description, bottom, frame + [_drawn(line, axes) for line in shown] + legend)


def _finite(line: Line) -> Line:
    points = [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
    return Line(line.label, points, line.colour, line.dashed)


def _grid(axes: Axes, format_y: Format) -> Iterable[str]:
    for tick in axes.y_ticks:
        _, y = axes.at(axes.x_from, tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield text(LEFT - 8, y + 4, format_y(tick), "tick", "end")
    for tick in ticks(axes.x_from, axes.x_to):
        if axes.x_from <= tick <= axes.x_to:
            yield text(axes.at(tick, axes.y_ticks[0])[0], BOTTOM + 20, plain(tick), "tick", "middle")


def _drawn(line: Line, axes: Axes) -> str:
    places = [axes.at(x, y) for x, y in line.points]
    title = f"<title>{escape(line.label)}</title>"
    if len(places) == 1:
        ((x, y),) = places
        return f'<circle class="{_style(line)}" cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline class="{_style(line)}" points="{path}">{title}</polyline>'


def _legend(lines: Iterable[Line]) -> tuple[list[str], float]:
    """Marks and names, wrapped to the chart's width by estimate; and where the legend ends."""
    parts: list[str] = []
    x, y = float(LEFT), float(LEGEND_TOP)
    for line in lines:
        label = shortened(line.label, 40)
        width = LEGEND_MARK + CHARACTER * len(label)
        if x > LEFT and x + width > WIDTH:
            x, y = float(LEFT), y + LEGEND_ROW
        parts.append(f'<polyline class="{_style(line)}" points="{x:.1f},{y - 4:.1f} {x + 20:.1f},{y - 4:.1f}"/>')
        parts.append(text(x + LEGEND_MARK, y, label, "label"))
        x += width + LEGEND_GAP
    return parts, y + 10


def _style(line: Line) -> str:
    return f"line c{line.colour % COLOURS}" + (" dashed" if line.dashed else "")


# Bars

BAR_LEFT, BAR_RIGHT, BAR_ROW, HEADING_ROW, GROUP_GAP = 132, WIDTH - 68, 28, 26, 14
BAR_SHARE = 0.66  # of its row's height


def bar_chart(
    groups: Sequence[BarGroup],
    *,
    title: str,
    description: str,
    maximum: float | None = None,
    row: float = BAR_ROW,
    format_value: Format = plain,
) -> str:
    """Horizontal bars from 0 to `maximum` (else the highest value), each with its name before and its value behind.

    `row` is the height that a bar takes, its gap included.
    """
    values = [bar.value for group in groups for bar in group.bars if math.isfinite(bar.value)]
    longest = maximum or max([*values, 0.0]) or 1.0
    parts: list[str] = []
    y = 4.0
    for group in groups:
        if group.heading:
            parts.append(text(0, y + 16, shortened(group.heading, 48), "heading"))
            y += HEADING_ROW
        for bar in group.bars:
            parts.append(_bar(bar, y, row, longest, format_value))
            y += row
        y += GROUP_GAP
    return picture(title, description, max(y - GROUP_GAP, 20), parts)


def _bar(bar: Bar, y: float, row: float, longest: float, format_value: Format) -> str:
    known = math.isfinite(bar.value)
    width = min(1.0, max(0.0, bar.value / longest)) * (BAR_RIGHT - BAR_LEFT) if known else 0.0
    value = format_value(bar.value) if known else "n/a"
    height = BAR_SHARE * row
    base_line = y + height / 2 + 5
    place = f'x="{BAR_LEFT}" y="{y:.1f}" height="{height:.1f}" rx="3"'
    return (
        f"<g><title>{escape(bar.label)}: {escape(value)}</title>"
        f'<rect class="track" {place} width="{BAR_RIGHT - BAR_LEFT}"/>'
        f'<rect class="bar {escape(bar.kind)}" {place} width="{max(2.0, width):.1f}"/>'
        + text(BAR_LEFT - 10, base_line, shortened(bar.label, 15), "label", "end")
        + text(BAR_RIGHT + 10, base_line, value, "value")
        + "</g>"
    )
