import itertools
import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.charts import COLOURS, Bar, BarGroup, Line, bar_chart, line_chart
from launcher.svg import WIDTH, extent, plain, shortened, ticks

HOSTILE = "<script>alert(\"x\")</script> & 'co'"
NUMBERS = st.floats(-1e12, 1e12, allow_nan=False)


def parsed(svg: str) -> ElementTree.Element:
    """Well-formed, and nothing that is not a number where one should be."""
    assert not {"nan", "inf"} & set(svg.replace('"', " ").replace(",", " ").split())
    return ElementTree.fromstring(svg)


def lines(*series: Line, **options: object) -> ElementTree.Element:
    return parsed(line_chart(series, title="Loss", description="d", x_label="step", **options))  # type: ignore[arg-type]


def drawn(root: ElementTree.Element) -> list[ElementTree.Element]:
    """The series: what has a tooltip."""
    return [element for element in root if element.tag in ("polyline", "circle") and element.find("title") is not None]


def places(element: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in element.attrib["points"].split())]


def words(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter("text")]


def bars(*groups: BarGroup, maximum: float | None = None) -> ElementTree.Element:
    return parsed(bar_chart(groups, title="Quality", description="d", maximum=maximum))


def widths(root: ElementTree.Element) -> list[float]:
    return [float(r.attrib["width"]) for r in root.iter("rect") if r.attrib["class"].startswith("bar")]


def test_a_line_has_its_points_in_order_and_higher_values_higher() -> None:
    (series,) = drawn(lines(Line("a", [(1, 5.0), (2, 1.0), (3, 3.0)])))
    (x1, y1), (x2, y2), (x3, y3) = places(series)
    assert x1 < x2 < x3
    assert y1 < y3 < y2  # y grows downwards


def test_lines_share_their_axes() -> None:
    first, second = drawn(lines(Line("a", [(0, 1.0), (10, 1.0)]), Line("b", [(0, 2.0), (5, 1.0)], colour=1)))
    assert places(first)[0][0] == places(second)[0][0]
    assert places(first)[1][1] == places(second)[1][1]
    assert first.attrib["class"] == "line c0"
    assert second.attrib["class"] == "line c1"


def test_title_and_description_are_there_for_screen_readers() -> None:
    root = lines(Line("a", [(0, 1.0), (1, 2.0)]))
    assert root.attrib["role"] == "img"
    assert (root[0].tag, root[0].text, root[1].tag, root[1].text) == ("title", "Loss", "desc", "d")


def test_axes_have_round_numbers_and_a_label() -> None:
    shown = words(lines(Line("a", [(0, 0.0), (100, 4.8)])))
    assert {"0", "20", "100", "1", "5", "step"} <= set(shown)


def test_the_y_axis_can_be_fixed_and_formatted() -> None:
    root = lines(Line("a", [(0, 0.4), (1, 0.5)]), y_range=(0.0, 1.0), format_y=lambda value: f"{value:.0%}")
    assert {"0%", "100%"} <= set(words(root))
    beyond = drawn(lines(Line("a", [(0, -3.0), (1, 7.0)]), y_range=(0.0, 1.0)))[0]
    assert all(0 <= y <= 300 for _, y in places(beyond))


def test_the_legend_names_solid_lines_and_stays_within_the_picture() -> None:
    many = [Line(f"a rather long name {index}", [(0, 1.0), (1, 2.0)], colour=index) for index in range(12)]
    root = lines(*many, Line("quiet", [(0, 1.0), (1, 1.0)], dashed=True))
    shown = words(root)
    assert all(line.label in shown for line in many)
    assert "quiet" not in shown
    bottom = float(root.attrib["viewBox"].split()[3])
    labels = [element for element in root.iter("text") if element.attrib["class"] == "label"]
    assert max(float(element.attrib["y"]) for element in labels) < bottom
    assert max(float(element.attrib["x"]) for element in labels) < WIDTH


def test_colours_repeat() -> None:
    (series,) = drawn(lines(Line("a", [(0, 1.0), (1, 2.0)], colour=COLOURS + 2, dashed=True)))
    assert series.attrib["class"] == "line c2 dashed"


def test_one_point_is_a_dot() -> None:
    (dot,) = drawn(lines(Line("a", [(3, 2.0)])))
    assert dot.tag == "circle"


def test_equal_values_are_a_level_line() -> None:
    (series,) = drawn(lines(Line("a", [(0, 0.0), (1, 0.0), (2, 0.0)])))
    assert len({y for _, y in places(series)}) == 1


@pytest.mark.parametrize("series", [(), (Line("a", []),), (Line("a", [(0, math.nan), (1, math.inf)]),)])
def test_nothing_to_show_is_said(series: tuple[Line, ...]) -> None:
    assert words(lines(*series)) == ["nothing to show"]


def test_values_that_are_not_finite_are_left_out() -> None:
    (series,) = drawn(lines(Line("a", [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)])))
    assert len(places(series)) == 2


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=8))
def test_any_numbers_stay_within_the_picture(points: list[tuple[float, float]]) -> None:
    root = lines(Line("a", points))
    for series in drawn(root):
        for x, y in places(series) if series.tag == "polyline" else []:
            assert 0 <= x <= WIDTH
            assert 0 <= y <= 300


def test_bars_are_as_long_as_their_values() -> None:
    root = bars(BarGroup("north", [Bar("alone", 0.5, "alone"), Bar("together", 1.0, "together")]), maximum=1.0)
    half, whole = widths(root)
    assert half == pytest.approx(whole / 2, abs=0.1)
    assert {"north", "alone", "together", "0.5", "1"} <= set(words(root))


def test_without_a_maximum_the_longest_bar_fills_the_track() -> None:
    root = bars(BarGroup("", [Bar("a", 3.0, "alone"), Bar("b", 6.0, "alone")]))
    track = float(next(r for r in root.iter("rect") if r.attrib["class"] == "track").attrib["width"])
    assert max(widths(root)) == track


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bar_without_a_finite_value_says_so(value: float) -> None:
    root = parsed(bar_chart([BarGroup("", [Bar("a", value, "alone")])], title="t", description="d"))
    assert "n/a" in words(root)


def test_bars_of_zero_and_below_and_none_at_all() -> None:
    assert all(width >= 0 for width in widths(bars(BarGroup("", [Bar("a", 0.0, "alone"), Bar("b", -1.0, "alone")]))))
    assert widths(bars()) == []


def test_thicker_rows_make_a_taller_chart() -> None:
    group = [BarGroup("", [Bar("a", 1.0, "alone"), Bar("b", 1.0, "alone")])]
    thin, thick = (parsed(bar_chart(group, title="t", description="d", row=row)) for row in (20, 60))
    assert float(thick.attrib["viewBox"].split()[3]) > 2 * float(thin.attrib["viewBox"].split()[3])


def test_every_text_is_escaped() -> None:
    line = line_chart([Line(HOSTILE, [(0, 1.0), (1, 2.0)])], title=HOSTILE, description=HOSTILE, x_label=HOSTILE)
    bar = bar_chart([BarGroup(HOSTILE, [Bar(HOSTILE, 1.0, '"><script>')])], title=HOSTILE, description=HOSTILE)
    for svg in (line, bar):
        assert "<script" not in svg
        assert parsed(svg)[0].text == HOSTILE


@given(NUMBERS, NUMBERS)
def test_ticks_enclose_the_values_evenly(a: float, b: float) -> None:
    low, high = extent([a, b])
    marks = ticks(low, high)
    room = 1e-6 * (high - low)
    assert marks[0] <= low + room
    assert marks[-1] >= high - room
    assert 2 <= len(marks) <= 12
    assert all(first < second for first, second in itertools.pairwise(marks))


def test_ticks_are_ones_twos_or_fives() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(1.0, 240.0) == [0.0, 50.0, 100.0, 150.0, 200.0, 250.0]
    assert ticks(0.01, 0.034) == [0.01, 0.015, 0.02, 0.025, 0.03, 0.035]


def test_numbers_and_names_are_kept_short() -> None:
    assert plain(12345.6) == "12,346"
    assert plain(0.25) == "0.25"
    assert shortened("north", 5) == "north"
    assert shortened("hospital-number-7", 9) == "hosp…er-7"
    assert shortened("ab", 1) == "…"
