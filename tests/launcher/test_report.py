import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console

from launcher.report import ClientPrivacy, ClientQuality, Curve, Process, Quality, Report, summary_table, write_report
from launcher.report_data import alone_text, bytes_text, duration_text, metric_text
from launcher.report_page import MOST_POINTS, page, smoothed, thinned

KEYS = {
    *("title", "metric", "quality", "by_client", "curves", "tokens_per_s", "wire_bytes", "rounds", "steps", "seconds"),
    *("processes", "job", "versions", "privacy"),
}
VOID = {"meta", "br", "rect", "path"}


def make_report(names: tuple[str, ...] = ("north", "valley"), metric: str = "accuracy", joint: float = 0.983) -> Report:
    loss = [(float(step), 5.0 / step) for step in range(1, 49)]
    return Report(
        title="Two hospitals, one model",
        metric=metric,
        quality=Quality(
            metric=metric,
            higher_is_better=metric == "accuracy",
            joint=joint,
            centralised=0.987,
            alone={name: 0.4 + 0.1 * index for index, name in enumerate(names)},
        ),
        by_client={name: ClientQuality(joint=0.99, alone=0.91, centralised=0.98) for name in names},
        curves=[
            *(Curve(name=name, kind="loss", points=loss) for name in names),
            *(Curve(name=name, kind="loss", points=loss, run="alone") for name in names),
            Curve(name="centralised", kind="loss", points=loss, run="centralised"),
            *(Curve(name=name, kind="validation", points=[(0, 0.1), (4, 0.9)]) for name in names),
        ],
        tokens_per_s=4321.0,
        wire_bytes={"up": 12_300_000, "down": 4_500_000},
        rounds=12,
        steps=48,
        seconds=33.0,
        processes=[Process(role="client", name=name, pid=100, exit_code=0) for name in names],
        job={"name": "hospitals", "note": "<b>"},
        versions={"torch": "2.13"},
    )


class Reader(HTMLParser):
    """Collects tags, addresses and text; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str | None] = []
        self.texts: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_both_files_are_written_and_the_json_has_these_keys(tmp_path: Path) -> None:
    report = make_report()
    write_report(report, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(document) == KEYS
    assert document["quality"]["alone"] == {"north": 0.4, "valley": 0.5}
    assert document["wire_bytes"] == {"up": 12_300_000, "down": 4_500_000}
    assert Report.model_validate(document) == report
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")


def test_a_run_that_diverged_still_gets_its_report(tmp_path: Path) -> None:
    report = make_report(joint=math.nan)
    report.curves[0].points.append((49.0, math.inf))
    write_report(report, tmp_path)
    strict = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict["quality"]["joint"] is None
    assert "n/a" in (tmp_path / "report.html").read_text()


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError):
        Report.model_validate(make_report().model_dump() | {"extra": 1})


def test_the_page_loads_nothing() -> None:
    html = page(make_report())
    assert not re.search(r"https?://|//[a-z]|url\(|@import", html)
    reader = Reader(html)
    assert reader.addresses == []
    assert not reader.tags & {"script", "link", "img", "iframe", "object", "embed"}


def test_the_page_says_what_was_gained() -> None:
    texts = " ".join(Reader(page(make_report())).texts)
    for expected in ("98.3%", "50.0%", "at best", "4,321", "12.3 MB", "4.5 MB", "48", "north", "valley", "torch"):
        assert expected in texts


def test_the_page_has_its_pictures_and_both_schemes() -> None:
    html = page(make_report())
    assert html.count("<svg ") == 5
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    assert "<details>" in html
    assert "$" not in html


def test_hostile_names_stay_text() -> None:
    hostile = '<script>alert("x")</script>'
    report = make_report((hostile, "valley"))
    report = report.model_copy(update={"title": hostile, "versions": {hostile: hostile}, "job": {hostile: hostile}})
    html = page(report)
    assert "<script" not in html
    assert hostile in "".join(Reader(html).texts)


def test_a_hostile_metric_stays_text() -> None:
    assert "<script" not in page(make_report(metric="<script>"))


@pytest.mark.parametrize("names", [(), ("only",), tuple(f"site-{index}" for index in range(20))])
def test_any_number_of_clients(names: tuple[str, ...]) -> None:
    report = make_report(names)
    html = page(report)
    Reader(html)
    assert ("at best" in html) == (len(names) > 1)
    assert summary_table(report).row_count == len(names) + 1


def test_no_curves_are_said_to_be_none() -> None:
    assert page(make_report().model_copy(update={"curves": []})).count("nothing to show") == 2


def test_failed_processes_are_counted() -> None:
    processes = [Process(role="server", name="server", pid=1, exit_code=code) for code in (0, 3, None)]
    assert "processes, 2 failed" in page(make_report().model_copy(update={"processes": processes}))


def test_the_table_on_screen_has_a_row_a_client_and_one_for_everyone() -> None:
    output = io.StringIO()
    Console(width=100, file=output).print(summary_table(make_report(("[red]north", "valley"))))
    text = output.getvalue()
    lines = {name: line for name in ("[red]north", "valley", "everyone") for line in text.splitlines() if name in line}
    assert re.search(r"91\.0%.*99\.0%.*98\.0%", lines["[red]north"])
    assert re.search(r"40\.0% to 50\.0%.*98\.3%.*98\.7%", lines["everyone"])
    assert re.search(r"alone.*joint.*centralised", text)


def test_the_best_alone_is_the_lowest_loss() -> None:
    quality = make_report(metric="loss").quality
    assert quality.best_alone() == 0.4
    assert make_report().quality.best_alone() == 0.5
    assert math.isnan(make_report(()).quality.best_alone())


def test_alone_is_told_from_worst_to_best() -> None:
    assert alone_text(make_report(metric="loss").quality) == "0.400 to 0.500"
    assert alone_text(make_report(("only",)).quality) == "40.0%"
    assert alone_text(make_report(()).quality) == "n/a"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (metric_text("accuracy", 0.9834), "98.3%"),
        (metric_text("loss", 1.23456), "1.235"),
        (metric_text("loss", math.inf), "n/a"),
        (bytes_text(999), "999 B"),
        (bytes_text(1_500), "1.5 kB"),
        (bytes_text(7_200_000_000), "7.2 GB"),
        (bytes_text(10**15), "1000.0 TB"),
        (duration_text(3.21), "3.2 s"),
        (duration_text(94.2), "94 s"),
        (duration_text(200), "3 min 20 s"),
        (duration_text(7500), "2 h 05 min"),
    ],
)
def test_quantities_for_people(text: str, expected: str) -> None:
    assert text == expected


def test_curves_are_smoothed_over_their_last_points() -> None:
    points = [(float(x), float(x % 2)) for x in range(48)]
    assert [y for _, y in smoothed(points)] == [0.0] + [0.5] * 47
    assert smoothed([]) == []
    assert smoothed([(1.0, 3.0)]) == [(1.0, 3.0)]


@given(st.integers(0, 5000))
def test_long_curves_are_thinned_and_keep_their_end(count: int) -> None:
    points = [(float(x), 1.0) for x in range(count)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert kept[-1:] == points[-1:]
    assert kept == sorted(kept)


def test_what_a_private_job_cost_is_in_both(tmp_path: Path) -> None:
    cost = ClientPrivacy(type="central", rounds=12, epsilon=3.14159, delta=1e-5)
    report = make_report().model_copy(update={"privacy": {"nor<th": cost}})
    write_report(report, tmp_path)
    kept = json.loads((tmp_path / "report.json").read_text())["privacy"]
    assert kept == {"nor<th": {"type": "central", "rounds": 12, "epsilon": 3.14159, "delta": 1e-5}}
    texts = Reader((tmp_path / "report.html").read_text()).texts
    for cell in ("Privacy of updates", "nor<th", "central", "12", "3.142", "1e-05"):
        assert cell in texts
    assert "Privacy of updates" not in page(make_report())
