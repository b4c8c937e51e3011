"""`flglm data check`: what it counts, shows and refuses."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from launcher.main import main
from shared.job import load_job
from shared.model.checkpoint import checkpoint_of
from worker_client.client import ClientSettings, _rows
from worker_client.data_check import distribution


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Takes 64 tokens; word w<i> is token i."""
    folder = save_tiny_model("llama", tmp_path_factory.mktemp("model"))
    save_word_tokenizer(folder)
    return str(folder)


def check(
    path: Path, model: str | None, capsys: pytest.CaptureFixture[str], *words: str, code: int = 0
) -> tuple[dict[str, Any], str]:
    """The answer for machines, and what was said on standard error."""
    named = [] if model is None else ["--model", model]
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(path), *named, "--format", "json", *words])
    said = capsys.readouterr()
    assert ended.value.code == code
    return json.loads(said.out), said.err


def words(count: int) -> str:
    """Without w10 to w19, which begin with the end token."""
    return " ".join(f"w{20 + n}" for n in range(count))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows of 4, 11, 31, 5 and 9 tokens; the last loses its completion when it is cut at 8."""
    records: list[dict[str, str]] = [
        {"prompt": words(2), "completion": "w7"},
        {"text": words(10)},
        {"text": words(30)},
        {"prompt": words(3), "completion": "w9"},
        {"prompt": words(8), "completion": ""},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_rows_are_counted_measured_and_cut(rows: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = check(rows, model, capsys, "--max-length", "8")[0]["data"]
    assert (found["rows"], found["usable"], found["truncated"], found["without_target"]) == (5, 4, 3, 1)
    assert found["tokens_cut"] == (11 - 8) + (31 - 8) + (9 - 8)
    assert found["shapes"] == {"prompt/completion": 3, "text": 2}
    assert found["lengths"] == {"min": 4, "mean": 12, "p50": 9, "p90": 31, "p95": 31, "p99": 31, "max": 31}
    assert found["targets"] == {"min": 2, "mean": 4.5, "p50": 2, "p90": 7, "p95": 7, "p99": 7, "max": 7}
    skipped = check(rows, model, capsys, "--max-length", "8", "--too-long", "skip")[0]["data"]
    assert (skipped["usable"], skipped["skipped_long"], skipped["truncated"]) == (2, 3, 0)


def test_the_first_row_shows_which_tokens_count(rows: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = check(rows, model, capsys)[0]["data"]["example"]
    assert example == {
        "line": 1,
        "shape": "prompt/completion",
        "tokens": [
            {"id": 20, "text": "w20", "in_loss": False},
            {"id": 21, "text": "w21", "in_loss": False},
            {"id": 7, "text": "w7", "in_loss": True},
            {"id": 1, "text": "w1", "in_loss": True},
        ],
    }
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(rows), "--model", model])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "\nw20|w21[w7|w1]\n" in said
    assert "5 of 5 rows can be trained on" in said


def test_of_a_text_the_first_token_is_not_in_the_loss(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("text\nw5 w6\n")
    tokens = check(tmp_path / "a.csv", model, capsys)[0]["data"]["example"]["tokens"]
    assert [token["in_loss"] for token in tokens] == [False, True, True]


def test_rows_are_cut_where_the_model_ends(rows: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows.write_text(json.dumps({"text": words(70)}))
    found = check(rows, model, capsys, "--max-length", "256")[0]["data"]
    assert (found["max_length"], found["truncated"]) == (64, 1)


METHODS = [
    ({"method": {"type": "lora"}}, 40),
    ({"method": {"type": "prompt", "num_virtual_tokens": 20}, "training": {"parts": ["head"]}}, 20),
    ({"method": {"type": "prefix", "num_virtual_tokens": 44}}, 20),
]


@pytest.mark.parametrize("too_long", ["truncate", "skip"])
@pytest.mark.parametrize(("settings", "limit"), METHODS, ids=["lora", "prompt", "prefix"])
def test_rows_are_cut_as_the_job_cuts_them(
    settings: dict[str, Any], limit: int, too_long: str, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt's tokens are among those of data.max_length; a prefix takes positions of the model's 64."""
    rows = tmp_path / "rows.jsonl"
    texts = [{"text": words(count)} for count in (3, 17, 19, 20, 37, 39, 40, 60)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*texts, {"prompt": words(30), "completion": "w7"}]))
    values = {"model_name_or_path": model, "data": {"max_length": 40, "too_long": too_long}, **settings}
    (tmp_path / "job.yaml").write_text(json.dumps(values))
    job = load_job(tmp_path / "job.yaml")
    client = ClientSettings(data=rows, out=tmp_path, validation_fraction=0)
    training = _rows(client, job, checkpoint_of(job))[2]

    found = check(rows, None, capsys, "--job", str(tmp_path / "job.yaml"))[0]["data"]
    assert found["max_length"] == limit
    counts = [(f["truncated"], f["skipped_long"], f["without_target"]) for f in (found, asdict(training))]
    assert counts[0] == counts[1]
    assert found["usable"] == len(training.rows)
    assert sum(counts[0]) > 0
    assert found["tokens_cut"] == (0 if too_long == "skip" else cut_off([4, 18, 20, 21, 38, 40, 41, 61, 32], limit))
    same = check(rows, model, capsys, "--job", str(tmp_path / "job.yaml"), "--max-length", "40", "--too-long", too_long)
    assert same[0]["data"] == found


def cut_off(lengths: list[int], limit: int) -> int:
    return sum(max(0, length - limit) for length in lengths)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "./other"], "--model ./other contradicts {job}: model_name_or_path=./model"),
        (["--max-length", "39"], "--max-length 39 contradicts {job}: data.max_length=40"),
        (["--too-long", "skip"], "--too-long skip contradicts {job}: data.too_long=truncate"),
    ],
)
def test_options_that_contradict_the_job_are_refused(
    options: list[str], said: str, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = rows.with_name("job.yaml")
    job.write_text("model_name_or_path: ./model\ndata: {max_length: 40}\n")
    answer, _ = check(rows, None, capsys, "--job", str(job), *options, code=4)
    assert (answer["error_code"], answer["message"]) == ("job", said.format(job=job))


def test_rows_need_a_job_or_a_model(rows: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--job" in check(rows, None, capsys, code=4)[0]["hint"]
    assert "data.max_length" in check(rows, model, capsys, "--max-length", "1", code=4)[0]["message"]
    assert check(rows, model, capsys, "--max-length", "1000000")[0]["data"]["max_length"] == 64


def test_every_bad_line_is_named_and_counted_by_reason(
    rows: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with rows.open("a") as file:
        file.write('no\n{"txt": "w5"}\n' + '{"text": 5}\n' * 30)
    said, errors = check(rows, model, capsys, code=4)
    assert said["error_code"] == "data"
    assert said["message"].startswith(f'{rows}: 32 of 37 rows are none that training takes (30 x "text" must be text')
    assert said["data"]["usable"] == 5
    assert len(said["data"]["errors"]) == 20
    assert said["data"]["errors"][0].startswith(f"{rows}:6: not JSON")
    assert said["data"]["errors"][1].startswith(f"{rows}:7: keys ['txt']; expected")
    assert said["data"]["reasons"]['"text" must be text, not int'] == 30
    assert "README.md" in errors
    with pytest.raises(SystemExit):
        main(["data", "check", str(rows), "--model", model])
    assert f'{rows}:8: "text" must be text, not int\n' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no usable row (0 longer than 4 tokens, 0 without"),
        ('{"text": "w5 w6 w7 w8 w9"}\n' * 3, "no usable row (3 longer than 4 tokens, 0 without"),
        ('{"text": "w5 w6 w7 w8 w9"}\nno\n', "no usable row (1 x not JSON"),
        ('{"text": "w5 w6 w7 w8 w9"}\nno\n', "; 1 x longer than 4 tokens)"),
    ],
)
def test_no_row_left_is_an_error_that_counts_the_reasons(
    content: str, said: str, rows: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows.write_text(content)
    answer, _ = check(rows, model, capsys, "--max-length", "4", "--too-long", "skip", code=4)
    assert said in answer["message"]


def test_a_row_writes_nothing_of_its_own_to_a_terminal(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["\x1b[2J"])
    tokenizer.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(model) / name).read_bytes())
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "w5 \x1b[2J"}))
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(tmp_path / "a.jsonl"), "--model", str(tmp_path)])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "\\x1b[2J" in said
    assert "\x1b[2J" not in said


def test_missing_files_and_models_are_named(rows: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.jsonl: No such file" in check(rows.with_name("none.jsonl"), model, capsys, code=4)[0]["message"]
    assert "no model folder" in check(rows, "./none", capsys, code=4)[0]["message"]


def test_percentiles_are_values_that_occur() -> None:
    assert distribution([]) == {}
    assert distribution([7]) == dict.fromkeys(("min", "mean", "p50", "p90", "p95", "p99", "max"), 7)
    hundred = distribution(range(1, 101))
    assert hundred == {"min": 1, "mean": 50.5, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
