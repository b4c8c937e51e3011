"""Every mistake a person can make on the command line or in a file: one line, a hint, the right exit code."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from launcher.main import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def invited(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A server and a client with keys, an admission and an invitation to a broker that is not there."""
    (folder / "job.yaml").write_text("model_name_or_path: ./model\n")
    for words in (
        ["keys", "new", "broker"],
        ["keys", "new", "server"],
        [*INVITE, "--broker-card", "keys/broker.card"],
        ["join", "hospital-a.invite"],
        ["admit", "keys/hospital-a.card"],
    ):
        assert run(words) == 0
    capsys.readouterr()
    return folder


def run(words: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert isinstance(ended.value.code, int)
    return ended.value.code


INVITE = ["invite", "hospital-a", "--job", "job.yaml", "--server", "keys/server.card", "--broker", "tcp://127.0.0.1:9"]
SERVER = ["server", "--job", "job.yaml", "--key", "keys/server.key", "--broker-card", "keys/broker.card"]
CLIENT = ["client", "train", "--invite", "hospital-a.invite", "--key", "keys/hospital-a.key", "--data", "rows.jsonl"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["frob"], "No such command 'frob'"),
        (["client", "train"], "Missing option '--invite'"),
        ([*SERVER, "--threads", "0"], "--threads"),
        (["keys", "new", "Bad Name"], "is no name"),
        (["keys", "new", "server"], "exists already"),
        (["server", "--job", "none.yaml", "--key", "keys/server.key"], "none.yaml: No such file"),
        (SERVER[:5], "--broker needs --broker-card"),
        ([*SERVER, "--plain"], "--broker needs --broker-card"),
        ([*INVITE, "--out", "2"], "--broker needs --broker-card"),
        ([*INVITE, "--out", "2", "--broker-card", "keys/server.key"], "keys/server.key"),
        ([*INVITE[:-1], "tcp://gpu.example:1", "--plain", "--out", "2"], "would leave this machine"),
        (["broker"], "a broker needs --key"),
        (["broker", "--key", "keys/broker.key", "--clients", "clients"], "servers is no folder of cards"),
        (["broker", "--plain", "--clients-address", "tcp://*:5555"], "would leave this machine"),
        (["join", "hospital-a.invite"], "exists already"),
        ([*CLIENT, "--out", "o", "--policy", "none.yaml"], "none.yaml: No such file"),
        (SERVER, "no model folder at ./model"),
        (["revoke", "stranger"], "nobody is admitted as stranger"),
        (["demo", "--data", "."], "--data needs --model"),
        (["demo", "--model", "./model"], "--model needs --data"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_4(
    words: list[str], said: str, invited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 4
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("flglm: ") == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_machines_get_the_error_as_one_object(invited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SERVER, "--format", "json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert document["status"] == "error"
    assert document["error_code"] == "model"
    assert document["hint"]


def test_an_unknown_setting_is_answered_with_the_nearest(invited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (invited / "job.yaml").write_text("model_name_or_path: m\nsplit: {head_block: 1}\n")
    assert run(SERVER) == 4
    assert "did you mean 'head_blocks'" in capsys.readouterr().err


def test_a_split_that_leaves_no_trunk_is_refused(invited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model("llama", invited / "model")
    (invited / "job.yaml").write_text("model_name_or_path: ./model\nsplit: {head_blocks: 2, tail_blocks: 2}\n")
    assert run(SERVER) == 4
    assert "leave no trunk: the model has 4 blocks" in capsys.readouterr().err


def test_a_corrupt_checkpoint_is_refused(invited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model("llama", invited / "model")
    (invited / "model" / "model.safetensors").write_bytes(b"\xff" * 64)
    assert run(SERVER) == 4
    assert "corrupt or unreadable safetensors" in capsys.readouterr().err


def test_a_broker_that_is_not_there_ends_in_a_bounded_wait(invited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*CLIENT, "--out", "out", "--connect-timeout", "0.3"]) == 2
    captured = capsys.readouterr()
    assert "no broker answers at tcp://127.0.0.1:9" in captured.err
    assert "flglm broker" in captured.err


def test_a_port_in_use_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        assert run(["broker", "--clients-address", address, "--servers-address", "tcp://127.0.0.1:*", "--plain"]) == 2
    captured = capsys.readouterr()
    assert address in captured.err
    assert "--clients-address" in captured.err


def test_an_expired_invitation_is_refused(invited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = invited / "hospital-a.invite"
    document = json.loads(path.read_text()) | {"expires_at": "2020-01-01T00:00:00Z"}
    path.write_text(json.dumps(document))
    assert run([*CLIENT, "--out", "out"]) == 4
    assert "expired" in capsys.readouterr().err


def test_a_key_that_others_can_read_is_refused(invited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (invited / "keys" / "server.key").chmod(0o644)
    assert run(SERVER) == 4
    assert "chmod 600" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "w5"}\nnot json\n', "a.jsonl:2: not JSON"),
        ("", "no usable row"),
        ('{"txt": "w5"}\n', "a.jsonl:1: keys ['txt']; expected"),
    ],
)
def test_unreadable_rows_are_named_before_any_process_starts(
    content: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_word_tokenizer(save_tiny_model("llama", folder / "model"))
    (folder / "rows").mkdir()
    (folder / "rows" / "a.jsonl").write_text(content)
    assert run(["demo", "--model", "./model", "--data", "rows", "--out", "out"]) == 4
    captured = capsys.readouterr()
    assert said in captured.err
    assert not (folder / "out" / "logs").exists()


CONTRADICTORY = "cohort: {clients: 2}\naggregation: {type: fedavg, lora: exact}\n"


@pytest.mark.parametrize(
    ("job", "words", "said"),
    [
        (CONTRADICTORY, [], "job.yaml, with the demo's 3 clients: settings: Value error, aggregation.lora=exact"),
        ("method: {type: prefix}\ntraining: {parts: [trunk]}\n", [], "name all of training.parts"),
        ("rounds: {local_steps: 4}\n", ["--steps", "6"], "--steps 6 is not a multiple of the 4 steps of a round"),
    ],
)
def test_a_job_that_the_demos_clients_contradict_is_refused_before_any_process_starts(
    job: str, words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_word_tokenizer(save_tiny_model("llama", folder / "model"))
    (folder / "rows").mkdir()
    for name in "abc":
        (folder / "rows" / f"{name}.jsonl").write_text('{"text": "w5 w6"}\n' * 20)
    (folder / "job.yaml").write_text("model_name_or_path: m\n" + job)
    demo = ["demo", "--model", "./model", "--data", "rows", "--job", "job.yaml", "--out", "out", *words]
    assert run(demo) == 4
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert not (folder / "out" / "logs").exists()


def test_a_crash_is_internal_and_not_a_refusal() -> None:
    """Of which supervisors start nothing again."""
    program = "from launcher import main; main.app = lambda **_: 1 / 0; main.main()"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 5
    assert "ZeroDivisionError" in ended.stderr
