"""`flglm eval`: what it prints, and what it refuses."""

import importlib.util
import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fidelity import ALL, Case, make_job, random_rows
from benchmarks.shared_data import FOLDER
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from broker.settings import BrokerSettings
from launcher.in_process import serving
from launcher.main import main
from shared import state_files
from shared.invitations import BrokerAt, Invitation, write_invitation
from shared.job import Lora
from shared.model.checkpoint import checkpoint_of
from worker_client.evaluation.local_model import load_local_model
from worker_client.evaluation.scoring import likelihoods
from worker_client.head_tail import load_client_parts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_tiny_model("llama", tmp_path_factory.mktemp("model"))
    save_word_tokenizer(folder)
    return str(folder)


def run(*words: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["eval", *words])
    assert ended.value.code == code


def results(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out.splitlines()[-1])["data"]["results"]
    return found


def test_rows_have_their_loss_and_perplexity(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = random_rows(70, 2)
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(f"w{20 + token % 70}" for token in row.input_ids)}) + "\n" for row in rows)
    )
    run("--model", model, "--task", f"rows={tmp_path / 'a.jsonl'}", "--format", "json", "--max-length", "9")
    (found,) = results(capsys)
    assert found["examples"] == 70
    assert found["metrics"]["perplexity"] == pytest.approx(math.exp(found["metrics"]["loss"]))
    run("--model", model, "--task", f"rows={tmp_path / 'a.jsonl'}", "--format", "json", "--limit", "1")
    (one,) = results(capsys)
    from worker_client.data import load_rows

    local = load_local_model(model)
    (row, *_) = load_rows(tmp_path / "a.jsonl", local.tokenizer, max_length=64).rows
    (likelihood,) = likelihoods(local.logits, [row])
    assert one["metrics"]["loss"] == pytest.approx(-likelihood.log_probability / likelihood.tokens)
    assert (one["examples"], one["tokens"]) == (1, likelihood.tokens)


def test_rows_that_were_cut_to_nothing_are_counted(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"prompt": "w20 w21 w22", "completion": "w23"}, {"text": "w20 w21"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run("--model", model, "--task", f"rows={tmp_path / 'a.jsonl'}", "--format", "json", "--max-length", "3")
    (found,) = results(capsys)
    assert (found["examples"], found["cut"], found["left_out"], found["tokens"]) == (1, 1, 1, 2)


def test_tasks_are_answered_counted_and_limited(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        {"premise": "w20 w21 .", "choice1": "w22", "choice2": "w23 w24", "question": "cause", "label": n % 2}
        for n in range(6)
    ]
    (tmp_path / "copa.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run("--model", model, "--task", f"copa={tmp_path / 'copa.jsonl'}", "--limit", "4", "--format", "jsonl")
    event = json.loads(capsys.readouterr().out.splitlines()[0])
    assert event["event"] == "result"
    # The same question four times, with each answer right twice.
    assert (event["examples"], event["metrics"], event["chance"]) == (4, {"accuracy": 0.5}, 0.5)
    run("--model", model, "--task", f"copa={tmp_path / 'copa.jsonl'}")
    said = capsys.readouterr().out
    assert "copa" in said
    assert "accuracy 0.5" in said


def test_summaries_get_rouge(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rouge_score", reason="the extra 'eval' is not installed")
    local = load_local_model(model)
    from worker_client.evaluation.summaries import continuation

    made, _ = continuation(local, "w20 w21\n\nTL;DR:", 5, 64)
    records = [{"document": "w20 w21", "summary": made}, {"document": "w20 w21", "summary": "nothing of it"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["--model", model, "--task", f"summaries={tmp_path / 'a.jsonl'}", "--format", "json"]
    run(*words, "--max-new-tokens", "5")
    (found,) = results(capsys)
    assert found["metrics"] == pytest.approx({"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5})
    run(*words, "--max-new-tokens", "64", code=4)
    assert "leaves no room" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "copa"], "--task copa: expected NAME=FILE"),
        (["--task", "cpoa=x.jsonl"], "no task 'cpoa'"),
        (["--task", "copa=none.jsonl"], "none.jsonl: No such file"),
        (["--task", "sst2=none.txt"], "none.txt: No such file"),
        (["--task", "copa=rows.jsonl"], 'rows.jsonl:2: no "question"; there are label, premise'),
        (["--task", "copa=empty.jsonl"], "empty.jsonl: no example"),
        (["--task", "rows=empty.jsonl"], "empty.jsonl: no usable row"),
        (["--task", "copa=rows.jsonl", "--server-state", "s"], "--server-state needs --trained"),
        (["--task", "copa=rows.jsonl", "--trained", "t"], "no finished job"),
        (["--task", "copa=rows.jsonl", "--out", "o"], "--key, --out and --policy need --invite"),
        (["--task", "copa=rows.jsonl", "--invite", "i", "--key", "k"], "--invite needs --key and --out"),
        (["--task", "copa=rows.jsonl", "--invite", "i", "--trained", "t"], "do not go with --invite"),
        (["--task", "copa=rows.jsonl", "--invite", "i", "--device", "cuda"], "do not go with --invite"),
        (["--task", "copa=rows.jsonl", "--invite", "i", "--key", "k", "--out", "o"], "k: No such file"),
        (["--task", "copa=rows.jsonl", "--limit", "0"], "--limit"),
        (["--task", "copa=rows.jsonl", "--device", "toaster"], "--device toaster: no such device"),
        (["--task", "copa=rows.jsonl", "--device", "cuda:999"], "--device cuda:999: there is none here"),
        ([], "Missing option '--task'"),
    ],
)
def test_mistakes_are_named(
    words: list[str],
    said: str,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('\n{"premise": "w5", "label": 0}\n')
    Path("empty.jsonl").write_text("")
    run("--model", model, *words, code=4)
    assert said in capsys.readouterr().err


def test_through_a_session_an_untrained_job_scores_as_its_model(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LoRA adds nothing yet. Real links, the words of the command line, files as the launcher writes them."""
    rows = [{"text": " ".join(f"w{20 + token % 70}" for token in row.input_ids)} for row in random_rows(5, 2)]
    copa = {"premise": "w20 w21 .", "choice1": "w22", "choice2": "w23 w24", "question": "cause", "label": 1}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "copa.jsonl").write_text(json.dumps(copa) + "\n")
    words = ["--task", f"rows={tmp_path / 'rows.jsonl'}", "--task", f"copa={tmp_path / 'copa.jsonl'}"]
    if importlib.util.find_spec("rouge_score"):
        (tmp_path / "a.jsonl").write_text(json.dumps({"document": "w20 w21", "summary": "w30 w31"}) + "\n")
        words += ["--task", f"summaries={tmp_path / 'a.jsonl'}", "--max-new-tokens", "5"]
    words += ["--format", "json"]
    run("--model", model, *words)
    expected = results(capsys)
    job = make_job(Path(model), Case(ALL, 1, method=Lora(r=4)))
    doors = BrokerSettings(frontend="tcp://127.0.0.1:*", backend="tcp://127.0.0.1:*")
    with serving(job, tmp_path, ["anna"], broker_settings=doors) as running:
        invitation = Invitation(
            id="0" * 32,
            client="anna",
            brokers=[BrokerAt(address=running.broker.frontend)],
            server="server",
            server_public_key=running.server.public.hex(),
            job=job.digest().hex(),
            expires_at=datetime.now(UTC) + timedelta(hours=1),
        )
        write_invitation(tmp_path / "anna.invite", invitation, None)
        private = running.clients["anna"].private.private_bytes_raw().hex()
        (tmp_path / "anna.key").touch(mode=0o600)
        (tmp_path / "anna.key").write_text(json.dumps({"version": 1, "name": "anna", "private_key": private}))
        parts = load_client_parts(checkpoint_of(job), job)
        tensors = {f"trained/{name}": p.detach() for name, p in parts.parameters.items()}
        state_files.save(tmp_path / "out", 0, tensors, {"job": job.digest().hex(), "steps": 0.0})
        session = ["--invite", str(tmp_path / "anna.invite"), "--key", str(tmp_path / "anna.key")]
        run(*session, "--out", str(tmp_path / "out"), *words)
        said = capsys.readouterr()
        assert "checkpoint-0; trunk: server" in said.err
        found = json.loads(said.out.splitlines()[-1])["data"]["results"]
        run(*session, "--out", str(tmp_path / "nothing"), *words, code=4)
        assert "no result and no checkpoint" in capsys.readouterr().err
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["metrics"] == pytest.approx(theirs["metrics"], rel=1e-5)
        assert (mine["examples"], mine["cut"], mine["tokens"]) == (
            theirs["examples"], theirs["cut"], theirs["tokens"],
        )  # fmt: skip
    run(*session, "--out", str(tmp_path / "out"), "--connect-timeout", "0.5", *words, code=2)
    assert json.loads(capsys.readouterr().out)["error_code"] == "connection"


def test_a_model_too_short_to_split_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_model("llama", tmp_path / "short", num_hidden_layers=2)
    save_word_tokenizer(folder)
    run("--model", str(folder), "--task", "rows=a.jsonl", code=4)
    assert "2 blocks cannot be split" in capsys.readouterr().err


@pytest.mark.slow
def test_a_pretrained_model_knows_stories_and_not_superglue(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, copa = FOLDER / "models/tinystories-3m/hf", FOLDER / "tasks/copa_full/val.jsonl"
    if not (model.exists() and copa.exists()):
        pytest.skip(f"there is no {model} or {copa}")
    story = "Once upon a time, there was a little girl named Lily. She liked to play outside with her friends."
    (tmp_path / "story.jsonl").write_text(json.dumps({"text": story}))
    run(
        "--model",
        str(model),
        "--task",
        f"rows={tmp_path / 'story.jsonl'}",
        "--task",
        f"copa={copa}",
        "--format",
        "json",
    )
    story_found, copa_found = results(capsys)
    assert story_found["metrics"]["perplexity"] < 10
    assert copa_found["examples"] == 100
    assert 0.4 <= copa_found["metrics"]["accuracy"] <= 0.75
