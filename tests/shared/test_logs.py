"""Logs: a line an event, for people or machines, and nothing in them that does not belong there."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from shared.logs import configure, event

logger = logging.getLogger("tests.logs")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def root_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def logged(
    monkeypatch: pytest.MonkeyPatch, to: io.StringIO, format: Literal["txt", "json"] | None = None, **fields: Any
) -> str:
    monkeypatch.setattr(sys, "stderr", to)
    configure("broker", format=format)
    event(logger, "session_opened", **fields)
    return to.getvalue()


def test_on_a_terminal_a_line_is_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    line = logged(monkeypatch, Terminal(), session=b"\xab" * 16, client="hospital-a", rows=3)
    time, rest = line.split(" ", 1)
    assert len(time) == len("12:34:56")
    assert rest.split() == ["INFO", "broker", "session_opened", "session=abababab", "client=hospital-a", "rows=3"]


def test_elsewhere_a_line_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    read = json.loads(logged(monkeypatch, io.StringIO(), session=b"\xab" * 16, rows=3, slow=True, why=None, s=0.5))
    assert isinstance(read.pop("time"), float)
    assert read == {
        "level": "info",
        "role": "broker",
        "event": "session_opened",
        "session": "abababab",
        "rows": 3,
        "slow": True,
        "why": None,
        "s": 0.5,
    }


def test_the_format_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert logged(monkeypatch, io.StringIO(), "txt").endswith("session_opened\n")
    assert json.loads(logged(monkeypatch, Terminal(), "json"))["event"] == "session_opened"


def test_bytes_longer_than_an_id_are_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    to = io.StringIO()
    with pytest.raises(TypeError, match=r"17 bytes do not belong in a log \(key\)"):
        logged(monkeypatch, to, key=b"k" * 17)
    assert to.getvalue() == ""


@pytest.mark.parametrize("value", [["a"], {"a": 1}, bytearray(b"a"), memoryview(b"a"), object()])
def test_only_scalars_are_logged(value: object) -> None:
    with pytest.raises(TypeError, match="does not belong in a log"):
        event(logger, "odd", field=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["txt", "json"])
def test_text_from_outside_forges_no_line(monkeypatch: pytest.MonkeyPatch, format: Literal["txt", "json"]) -> None:
    line = logged(monkeypatch, io.StringIO(), format, reason="no\n12:00:00 INFO    broker  all_is_well \x1b[2J")
    assert line.count("\n") == 1
    assert "\x1b" not in line


def test_details_are_shown_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    to = io.StringIO()
    monkeypatch.setattr(sys, "stderr", to)
    configure("server")
    event(logger, "step_done", level=logging.DEBUG)
    assert to.getvalue() == ""
    configure("server", verbose=True)
    event(logger, "step_done", level=logging.DEBUG)
    assert json.loads(to.getvalue())["level"] == "debug"


def test_setting_up_twice_does_not_double_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    configure("client")
    assert logged(monkeypatch, io.StringIO()).count("\n") == 1
