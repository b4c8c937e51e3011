"""`flglm privacy`: epsilon before a job, and a ledger as a table and as JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.main import main
from launcher.preflight.checks import Checklist
from launcher.preflight.privacy import check_privacy
from launcher.progress import ClientProgress, privacy_lines
from shared.job import NoPrivacy, parse_job
from worker_client.policy import Policy
from worker_client.privacy.accounting import epsilon
from worker_client.privacy.ledger import Ledger
from worker_client.privacy.protection import Protection


def run(words: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert isinstance(ended.value.code, int)
    return ended.value.code


JOB = parse_job(
    {
        "model_name_or_path": "m",
        "name": "clinic",
        "training": {"parts": ["head"]},
        "rounds": {"weighting": "clients", "count": 100},
        "privacy": {"type": "local", "clip_norm": 1.0, "noise_multiplier": 1.1, "delta": 1e-5},
    },
    "job",
)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / "rows.jsonl.privacy.json", "d" * 64)
    for _ in range(3):
        made.charge(JOB)
    return made


def test_the_cost_of_a_job_is_known_beforehand(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["privacy", "epsilon", "--noise-multiplier", "1.1", "--rounds", "100", "--delta", "1e-5"]
    assert run(words) == 0
    assert "epsilon 79.28 at delta 1e-05" in capsys.readouterr().out
    assert run([*words, "--format", "json"]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert data == {"noise_multiplier": 1.1, "rounds": 100, "delta": 1e-5, "epsilon": epsilon([(1.1, 100)], 1e-5)}


@pytest.mark.parametrize(
    ("option", "value"), [("--noise-multiplier", "0"), ("--rounds", "0"), ("--delta", "0"), ("--delta", "1")]
)
def test_what_no_job_could_say_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"--noise-multiplier": "1", "--rounds": "1", "--delta": "1e-5"} | {option: value}
    assert run(["privacy", "epsilon", *(word for pair in words.items() for word in pair)]) == 4
    assert option in capsys.readouterr().err


def test_a_ledger_is_shown(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["privacy", "ledger", str(ledger.path), "--delta", "1e-6"]) == 0
    shown = capsys.readouterr().out
    for text in ("clinic", JOB.digest().hex()[:16], "dddddddddddddddd", "local", "1.1", "3"):
        assert text in shown
    assert f"all together: epsilon {epsilon([(1.1, 3)], 1e-6):.4g} at delta 1e-06" in shown
    assert run(["privacy", "ledger", str(ledger.path), "--format", "json"]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert data["entries"][0]["rounds"] == 3
    assert data["epsilon"] == data["entries"][0]["epsilon"] == epsilon([(1.1, 3)], 1e-5)


@pytest.mark.parametrize(("content", "said"), [(None, "no such file"), ("{}", "not a privacy ledger")])
def test_what_is_no_ledger_is_named(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ledger.json"
    if content is not None:
        path.write_text(content)
    assert run(["privacy", "ledger", str(path), "--format", "json"]) == 4
    error = json.loads(capsys.readouterr().out)
    assert error["error_code"] == "ledger"
    assert said in error["message"]


def test_a_client_sees_what_is_covered_and_what_it_costs(
    ledger: Ledger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    events: list[dict[str, Any]] = []
    Protection(JOB, ledger, events.append).resume(0)
    covered, cost = privacy_lines(events[0])
    assert "covers this client's whole updates, against everybody" in covered
    assert "not covered: hidden states and gradients that go to the server" in covered
    assert "all rounds cost epsilon 79.28 at delta 1e-05" in cost
    assert f"all jobs before, {epsilon([(1.1, 3)], 1e-5):.4g}" in cost
    progress = ClientProgress(enabled=True)
    for event in (
        events[0],
        {"event": "privacy_spent", "round": 3, "rounds": 4, "epsilon": 8.25, "delta": 1e-5},
        {"event": "update_repeated", "round": 3},
    ):
        progress.show(event)
    shown = capsys.readouterr().err
    assert "4 rounds cost epsilon 8.25 at delta 1e-05" in shown
    assert "the update of round 4 is handed in again" in shown


def test_before_training_a_ledger_is_held_against_all_rounds(ledger: Ledger, tmp_path: Path) -> None:
    """3 of 100 rounds are paid: enough for 100 is well, for 50 a warning, for 3 a failure."""
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "x"}\n')
    found = {}
    for rounds in (100, 50, 3):
        rows = Checklist()
        policy = Policy(max_epsilon=epsilon([(1.1, rounds)], 1e-6) + 1e-6, max_delta=1e-6)
        check_privacy(rows, JOB, data, None, policy)
        found[rounds] = [str(row.status) for row in rows.rows]
        assert str(ledger.path) in rows.rows[0].found
    assert found == {100: ["ok"], 50: ["ok", "warn"], 3: ["fail"]}
    for other, job, said in (
        (data, JOB.model_copy(update={"privacy": NoPrivacy()}), []),
        (tmp_path / "none.jsonl", JOB, ["fail"]),
    ):
        rows = Checklist()
        check_privacy(rows, job, other, None, Policy())
        assert [str(row.status) for row in rows.rows] == said
