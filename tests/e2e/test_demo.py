"""The demo as people run it: processes, a report, an interruption and what comes after it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fidelity import write_random_rows
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from shared import state_files

JOB = """
name: tiny
model_name_or_path: replaced
method: {type: full}
training: {per_device_train_batch_size: 4}
rounds: {count: 4, local_steps: 8}
data: {max_length: 24}
"""
PATIENCE_S = 240


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A tiny model, two clients' rows and a job file."""
    save_word_tokenizer(save_tiny_model("llama", tmp_path / "model"))
    (tmp_path / "rows").mkdir()
    for seed, name in enumerate(("a", "b")):
        write_random_rows(tmp_path / "rows" / f"{name}.jsonl", 20, seed)
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path


@pytest.fixture(autouse=True)
def interruptible() -> None:
    """A shell that runs the tests in the background has SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(site: Path, out: str) -> "subprocess.Popen[str]":
    words = ["demo", "--model", "model", "--data", "rows", "--job", "job.yaml", "--out", out, "--format", "jsonl"]
    return subprocess.Popen(
        [sys.executable, "-m", "launcher.main", *words],
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    return out, err


def test_the_report_says_what_was_gained_and_an_interrupted_run_ends_the_same(site: Path) -> None:
    out, _ = finish(start(site, "whole"))
    report = json.loads((site / "whole" / "report.json").read_text())
    assert report["rounds"] == 4
    assert report["steps"] == 32
    assert set(report["quality"]["alone"]) == {"a", "b"}
    assert report["wire_bytes"]["up"] > 0
    assert report["wire_bytes"]["down"] > 0
    assert [process["role"] for process in report["processes"]] == ["broker", "server", "client", "client"]
    assert all(process["exit_code"] == 0 for process in report["processes"])
    assert "<svg" in (site / "whole" / "report.html").read_text()
    assert json.loads(out.splitlines()[-1])["status"] == "ok"

    interrupted = start(site, "cut")
    assert interrupted.stdout is not None
    for line in interrupted.stdout:  # until the second round is under way
        event = json.loads(line)
        if event.get("event") == "step" and event["round"] == 1:
            break
    interrupted.send_signal(signal.SIGINT)
    _, err = interrupted.communicate(timeout=PATIENCE_S)
    assert interrupted.returncode == 130
    assert "Traceback" not in err
    assert not children_of(interrupted.pid)
    assert state_files.numbers(site / "cut" / "server-state")[-1] >= 1

    out, _ = finish(start(site, "cut"))
    assert any(json.loads(line).get("event") == "resumed" for line in out.splitlines())
    for name in ("a", "b"):
        whole, cut = (site / run / "results" / name / "trained.safetensors" for run in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes()


def children_of(pid: int) -> list[int]:
    """Processes that still belong to the demo: those started with its run folder on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"cut/job.yaml" in words or b"cut/keys/a.invite" in words:
                found.append(int(entry.name))
    return [process for process in found if process != pid]
