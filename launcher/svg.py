"""Pieces of SVG that the report's pictures share: text, frame, scales. All text is escaped."""

import math
from collections.abc import Iterable, Sequence
from html import escape

# Every picture is this many units wide, so that text comes out the same size in all.
WIDTH = 480


def text(x: float, y: float, content: str, style: str, anchor: str = "start") -> str:
    """A line of text in class `style`, its `anchor` (start, middle or end) at x, its base line at y."""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def picture(title: str, description: str, height: float, parts: Iterable[str]) -> str:
    """The whole element; title and description are what a screen reader says."""
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def shortened(content: str, most: int) -> str:
    """The text, or its beginning, an ellipsis and its end (names often differ there): at most `most` characters."""
    if len(content) <= most:
        return content
    end = (most - 1) // 2
    return content[: most - 1 - end] + "…" + content[len(content) - end :]


def plain(value: float) -> str:
    """At most four significant digits, thousands with commas."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def extent(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest; equal ones get room on both sides."""
    low, high = min(values), max(values)
    if high - low > max(1e-12, 1e-9 * abs(low), 1e-9 * abs(high)):
        return low, high
    margin = abs(low) / 2 or 1.0
    return low - margin, high + margin


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high], low < high."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]
