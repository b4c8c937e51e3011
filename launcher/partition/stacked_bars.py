"""Horizontal bars made of parts, as inline SVG; colours are classes `f0` to `f7` that the page styles."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from launcher.svg import WIDTH, picture, shortened, text

LEFT, RIGHT = 132, WIDTH - 68
ROW, BAR_HEIGHT = 24, 16
LEGEND_ROW, LEGEND_COLUMNS = 22, 2
COLOURS = 8


@dataclass(frozen=True)
class Stack:
    """A bar's name, and how long each of its parts is."""

    label: str
    parts: Sequence[int]


def stacked_bars(stacks: Sequence[Stack], names: Sequence[str], *, title: str, description: str) -> str:
    """Bars on one scale from 0 to the longest, each with its total behind; below them what the colours are."""
    longest = max((sum(stack.parts) for stack in stacks), default=0) or 1
    shown: list[str] = []
    for number, stack in enumerate(stacks):
        shown += _bar(stack, names, 4.0 + number * ROW, (RIGHT - LEFT) / longest)
    top = 4.0 + len(stacks) * ROW + 14
    column = WIDTH / LEGEND_COLUMNS
    for number, name in enumerate(names):
        x, y = (number % LEGEND_COLUMNS) * column, top + (number // LEGEND_COLUMNS) * LEGEND_ROW
        shown.append(f'<rect class="{_style(number)}" x="{x:.1f}" y="{y:.1f}" width="12" height="12"/>')
        shown.append(text(x + 18, y + 11, shortened(name, 28), "label"))
    lines = -(-len(names) // LEGEND_COLUMNS)
    return picture(title, description, top + lines * LEGEND_ROW, shown)


def _bar(stack: Stack, names: Sequence[str], y: float, scale: float) -> list[str]:
    base_line = y + BAR_HEIGHT - 3
    shown = [text(LEFT - 10, base_line, shortened(stack.label, 18), "label", "end")]
    x = float(LEFT)
    for number, (name, part) in enumerate(zip(names, stack.parts, strict=True)):
        if part:
            place = f'x="{x:.2f}" y="{y:.1f}" width="{part * scale:.2f}" height="{BAR_HEIGHT}"'
            shown.append(f'<rect class="{_style(number)}" {place}><title>{escape(name)}: {part:,}</title></rect>')
            x += part * scale
    return [*shown, text(x + 8, base_line, f"{sum(stack.parts):,}", "value")]


def _style(number: int) -> str:
    return f"part f{number % COLOURS}"
