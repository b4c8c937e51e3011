"""A small load test: real broker, real server, every behaviour of clients."""

import json
from pathlib import Path

import pytest

from launcher.main import main
from launcher.scrape import scrape
from loadtest.plan import Plan
from loadtest.scene import check_open_files
from shared.errors import ConnectionFailed, UsageError


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[dict[str, object]]]:
    with pytest.raises(SystemExit) as ended:
        main(["loadtest", *words])
    out = capsys.readouterr().out
    return int(ended.value.code or 0), [json.loads(line) for line in out.splitlines()]


def test_clients_of_every_kind_are_served_and_the_honest_see_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "load"
    code, lines = run(
        capsys, "--clients", "24", "--seconds", "4", "--ramp", "1", "--think", "0.1", "--churning", "0.3",
        "--stay", "1", "--slow", "0.1", "--malicious", "0.1", "--processes", "2", "--out", str(out),
        "--format", "jsonl",
    )  # fmt: skip
    assert code == 0
    data = lines[-1]["data"]
    assert isinstance(data, dict)
    assert data["errors_by_code"] == {}
    assert data["clients"] >= 20
    assert data["throughput"]["requests_per_s"] > 0
    for kind in ("forward", "backward", "evaluate"):
        assert data["latencies"][kind]["count"] > 0
    assert data["cohorts"]["count"] == sum(data["cohorts"]["sizes"].values())
    assert data["departures"] > 0
    assert data["malicious_messages"] > 0
    assert sum(data["refusals"]["server"].values()) + sum(data["refusals"]["broker"].values()) > 0
    assert any(line.get("event") == "second" for line in lines)
    report = json.loads((out / "report.json").read_text())
    assert report["clients"] == data["clients"]
    assert "<svg" in (out / "report.html").read_text()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("precious")
    code, lines = run(capsys, "--out", str(tmp_path), "--format", "json")
    assert code == 4
    assert "is not empty" in str(lines[-1]["message"])


def test_settings_that_contradict_each_other_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(capsys, "--shortest", "9", "--longest", "8", "--format", "json")
    assert code == 4
    assert "shortest" in str(lines[-1]["message"])


def test_too_few_open_files_are_said_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    with pytest.raises(UsageError, match="open files") as refused:
        check_open_files(Plan(clients=100_000))
    assert "ulimit" in str(refused.value.hint)


def test_nobody_there_to_be_watched_is_one_line() -> None:
    with pytest.raises(ConnectionFailed, match="no metrics at"):
        scrape("127.0.0.1:9")
