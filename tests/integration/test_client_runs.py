"""A data owner's whole run, from invitation and file to a result on disk, and every way to be wrong before it."""

import json
import logging
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.fidelity import ALL, Case, make_job, random_rows, write_random_rows
from benchmarks.plain import train_plain
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from broker.settings import BrokerSettings
from launcher.in_process import CLIENTS, Background, Serving, Site, serving, train_one, trunk_tensors
from launcher.main import main
from launcher.progress import ClientProgress
from launcher.whole_models import drawn_whole
from shared import state_files
from shared.errors import CheckpointError, DataError, DeadlineExceeded, HandshakeError, ModelError, Refused
from shared.invitations import BrokerAt, Invitation, write_invitation
from shared.job import Job, Prompt, parse_job
from shared.model.checkpoint import SINGLE, Checkpoint, checkpoint_of
from worker_client.batches import batch_indices
from worker_client.client import ClientSettings, Result, finished_before, load_tokenizer, run_client
from worker_client.data import load_rows
from worker_client.head_tail import load_client_parts
from worker_client.local_trunk import trunk_of
from worker_client.remote_trunk import RemoteTrunk


@pytest.fixture
def job(tmp_path: Path) -> Job:
    model = save_tiny_model("llama", tmp_path / "model")
    save_word_tokenizer(model)
    made = make_job(model, Case(ALL, 1))
    return made.model_copy(update={"rounds": made.rounds.model_copy(update={"count": 1, "local_steps": 2})})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_random_rows(tmp_path / "rows.jsonl", 10, 0)


@pytest.fixture
def running(job: Job, tmp_path: Path) -> Iterator[Serving]:
    with serving(job, tmp_path, ["anna"]) as made:
        yield made


def invitation_of(running: Serving) -> Invitation:
    return Invitation(
        id="0" * 32,
        client="anna",
        brokers=[BrokerAt(address="tcp://localhost:1")],
        server="server",
        server_public_key=running.server.public.hex(),
        job=running.job.digest().hex(),
        expires_at=datetime.now(UTC),
    ).model_copy(update={"brokers": [BrokerAt.model_construct(address=CLIENTS)]})


def run(running: Serving, settings: ClientSettings, events: list[dict[str, Any]] | None = None) -> Result:
    seen = [] if events is None else events
    return run_client(settings, invitation_of(running), running.clients["anna"], seen.append, running.context)


def test_a_run_ends_with_the_trained_parts_on_disk(running: Serving, data: Path, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    out = tmp_path / "out"
    result = run(running, ClientSettings(data=data, out=out, validation_fraction=0.2), events)
    running.service.join()

    assert [event["event"] for event in events] == [
        "data", "updates", "round", "evaluation", "step", "step", "round_done", "evaluation", "finished",
    ]  # fmt: skip
    assert [(event.get("round"), event.get("rounds")) for event in events[2:]] == [
        (0, None), (None, 0), (0, None), (0, None), (0, None), (None, 1), (None, 1),
    ]  # fmt: skip
    assert (events[0]["rows"], events[0]["validation_rows"], events[0]["total_steps"]) == (8, 2, 2)
    assert (events[1]["handed_in"], events[1]["secure"]) == (True, "off")
    assert "a sum of fewer than 3 hides nothing" in events[1]["why_off"]
    assert result.score is not None
    assert result.score.rows == 2
    assert result.score.loss == events[-2]["loss"]
    assert result.bytes_up > 0
    assert result.bytes_down > 0

    trained = load_file(out / "trained.safetensors")
    parts = load_client_parts(Checkpoint(running.job.model_name_or_path), running.job)
    assert trained.keys() == parts.parameters.keys()
    assert any(not torch.equal(value, parts.parameters[name]) for name, value in trained.items())
    assert trained.keys().isdisjoint(trunk_tensors(tmp_path))
    document = json.loads((out / "flglm.json").read_text())
    assert Job.model_validate(document["job"]) == running.job
    assert document["job_digest"] == running.job.digest().hex()


@pytest.mark.parametrize("drawn", [False, True], ids=["log", "terminal"])
def test_a_log_has_a_line_for_every_round_and_a_terminal_a_bar(
    drawn: bool,
    job: Job,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if drawn:
        monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
    job = job.model_copy(update={"rounds": job.rounds.model_copy(update={"count": 2})})
    events: list[dict[str, Any]] = []
    with serving(job, tmp_path, ["anna"]) as running, ClientProgress(enabled=True) as progress:

        def report(event: dict[str, Any]) -> None:
            events.append(event)
            progress.show(event)

        settings = ClientSettings(data=data, out=tmp_path / "out", validation_fraction=0)
        run_client(settings, invitation_of(running), running.clients["anna"], report, running.context)
    losses = [[e["loss"] for e in events if e["event"] == "step" and e["round"] == round] for round in range(2)]
    expected = [f"round {n} of 2: mean loss {sum(of) / 2:.4f}" for n, of in enumerate(losses, 1)]
    lines = [line for line in capsys.readouterr().err.splitlines() if " of 2: " in line]
    assert [line.rpartition(",")[0] for line in lines] == ([] if drawn else expected)
    assert all(line.endswith(" s") for line in lines)


@pytest.fixture
def process_as_before() -> Iterator[None]:
    """A command sets handlers of signals and of logs for its process, which here is that of the tests."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    root, threads = logging.getLogger(), torch.get_num_threads()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    torch.set_num_threads(threads)
    for number, handler in signals.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("process_as_before")
def test_who_waits_in_vain_for_the_others_is_told_for_whom_and_how_to_wait_longer(
    job: Job, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command itself, against a job of two clients of whom one never comes."""
    pair = job.model_copy(update={"cohort": job.cohort.model_copy(update={"clients": 2})})
    anywhere = BrokerSettings(frontend="tcp://127.0.0.1:*", backend="tcp://127.0.0.1:*")
    with serving(pair, tmp_path, ["anna", "berta"], broker_settings=anywhere) as running:
        invited = invitation_of(running).model_copy(
            update={
                "brokers": [BrokerAt(address=running.broker.frontend)],
                "expires_at": datetime.now(UTC) + timedelta(days=1),
            }
        )
        write_invitation(tmp_path / "anna.invite", invited, None)
        words = ["--invite", "anna.invite", "--key", "keys/anna.key", "--data", data.name, "--out", "out"]
        at = [word if word.startswith("--") else str(tmp_path / word) for word in words]
        with pytest.raises(SystemExit) as ended:
            main(["client", "train", *at, "--wait", "0.5"])
    assert ended.value.code == DeadlineExceeded.exit_code == 3
    said = capsys.readouterr().err
    assert "no round began: the job waits for its other members (cohort.clients=2) (waited 0.5 s)" in said
    assert "--wait SECONDS waits longer" in said


def test_who_waits_in_vain_for_a_round_to_end_is_told_so(job: Job, tmp_path: Path) -> None:
    """In plain FedAvg: the other member is there, and trains without end."""
    values = job.model_dump(mode="json")
    pair = parse_job(values | {"split": {"trunk": "client"}, "cohort": values["cohort"] | {"clients": 2}}, "job")
    with serving(pair, tmp_path, ["anna", "berta"]) as running, running.link("berta") as slow:
        joined = Background("berta", lambda: RemoteTrunk(slow, pair, 60.0).join(8))
        waits = Site(random_rows(8, 0), trunk=lambda link, job, parts, _: trunk_of(link, job, parts, 60.0, 0.5))
        with pytest.raises(DeadlineExceeded, match=r"round 1 has not ended: .* other members \(waited 0.5 s\)") as late:
            train_one(running, "anna", waits, tmp_path)
        joined.join()
    assert late.value.hint is not None
    assert "--wait" in late.value.hint


def test_a_step_is_a_line_of_the_log_for_who_wants_details(
    running: Serving, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[dict[str, Any]] = []
    with caplog.at_level(logging.DEBUG, logger="worker_client"):
        run(running, ClientSettings(data=data, out=tmp_path / "out", validation_fraction=0), events)
    logged = [record for record in caplog.records if record.getMessage() == "step_done"]
    own = [record.fields for record in logged if record.name == "worker_client.steps"]  # type: ignore[attr-defined]
    assert [{"event": "step"} | fields for fields in own] == [e for e in events if e["event"] == "step"]
    assert len(own) == 2
    assert own[0].keys() == {"step", "round", "loss", "tokens", "seconds", "waited_s"}


def test_from_a_configuration_and_texts_to_a_model(job: Job, data: Path, tmp_path: Path) -> None:
    """No weights lie anywhere; the losses are those of the whole model drawn from the same seed."""
    (tmp_path / "model" / SINGLE).unlink()
    job = job.model_copy(update={"training": job.training.model_copy(update={"from_scratch": True})})
    events: list[dict[str, Any]] = []
    with serving(job, tmp_path, ["anna"]) as running:
        run(running, ClientSettings(data=data, out=tmp_path / "out", validation_fraction=0), events)
    rows = load_rows(data, load_tokenizer(checkpoint_of(job)), max_length=64).rows
    assert all(all(row.counts) for row in rows)
    size, seed = job.training.per_device_train_batch_size, job.training.seed
    batches = [[rows[i] for i in batch_indices(len(rows), size, step, seed)] for step in range(2)]
    whole = drawn_whole(job)
    trained = load_file(tmp_path / "out" / "trained.safetensors")
    own = [p for name, p in whole.named_parameters() if name in trained]
    others = [p for name, p in whole.named_parameters() if name not in trained]
    expected = train_plain(whole, batches, job.training, 2, [own, others])
    assert [event["loss"] for event in events if event["event"] == "step"] == pytest.approx(expected, rel=1e-5)


def test_virtual_tokens_of_a_prompt_take_room_in_rows(job: Job, data: Path, tmp_path: Path) -> None:
    update = {
        "method": Prompt(num_virtual_tokens=8),
        "training": job.training.model_copy(update={"parts": ("head",)}),
        "data": job.data.model_copy(update={"max_length": 20}),
    }
    events: list[dict[str, Any]] = []
    with serving(job.model_copy(update=update), tmp_path, ["anna"]) as running:
        run(running, ClientSettings(data=data, out=tmp_path / "out", validation_fraction=0), events)
    tokens = [len(json.loads(line)["text"].split()) + 1 for line in data.read_text().splitlines()]
    assert events[0]["truncated"] == sum(count > 12 for count in tokens) > 0
    assert load_file(tmp_path / "out" / "trained.safetensors").keys() == {"model.embed_tokens.prompt"}


def test_started_again_after_the_end_it_says_so_and_needs_nobody(running: Serving, data: Path, tmp_path: Path) -> None:
    settings = ClientSettings(data=data, out=tmp_path / "out", validation_fraction=0.2)
    first = run(running, settings)
    running.service.join()
    before = (tmp_path / "out" / "trained.safetensors").read_bytes()
    events: list[dict[str, Any]] = []
    again = run(running, settings, events)
    assert [event["event"] for event in events] == ["finished_before"]
    assert again.score == first.score
    assert (again.bytes_up, again.bytes_down) == (0, 0)
    assert (tmp_path / "out" / "trained.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [None, "{", "[]", '{"job_digest": "0"}', '{"job_digest": "JOB"}', '{"job_digest": "JOB", "score": {"loss": 1}}'],
)
def test_what_is_no_result_of_this_job_does_not_count_as_its_end(
    content: str | None, running: Serving, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "flglm.json").write_text(content.replace("JOB", running.job.digest().hex()))
    assert finished_before(tmp_path, invitation_of(running)) is None


@pytest.mark.parametrize(("own", "expected"), [(True, 3), (False, None)])
def test_validation_rows_come_from_a_file_or_not_at_all(
    own: bool, expected: int | None, running: Serving, data: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "own.jsonl"
    mine.write_text('{"text": "w5 w6 w7"}\n' * 3)
    events: list[dict[str, Any]] = []
    out = tmp_path / "out"
    score = run(running, ClientSettings(data, out, mine if own else None, validation_fraction=0), events).score
    assert (events[0]["rows"], events[0]["validation_rows"]) == (10, expected or 0)
    assert (score.rows if score else None) == expected


def test_rows_are_cut_to_the_models_context(running: Serving, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "w5 " * 100}) + "\n")
    events: list[dict[str, Any]] = []
    run(running, ClientSettings(data=long, out=tmp_path / "out", validation_fraction=0), events)
    assert events[0]["truncated"] == 1


def test_an_altered_model_is_refused_before_data_is_read(running: Serving, tmp_path: Path) -> None:
    other = save_tiny_model("llama", tmp_path / "other", seed=1)
    settings = ClientSettings(data=tmp_path / "absent.jsonl", out=tmp_path / "out", model=str(other))
    with pytest.raises(Refused, match="the weights differ") as refused:
        run(running, settings)
    assert refused.value.reason == "model_differs"


def test_what_is_wrong_at_a_client_is_said_there_and_the_next_run_works(
    running: Serving, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="No such file"):
        run(running, ClientSettings(data=tmp_path / "absent.jsonl", out=out))
    with pytest.raises(ModelError, match="no model folder"):
        run(running, ClientSettings(data=data, out=out, model=str(tmp_path / "absent")))
    state_files.save(out, 0, {}, {"job": "0" * 64, "steps": 0})
    with pytest.raises(CheckpointError, match="another job"):
        run(running, ClientSettings(data=data, out=out))
    torn = tmp_path / "torn"
    state_files.save(torn, 0, {}, {"job": running.job.digest().hex(), "steps": 0})
    (torn / "checkpoint-0" / state_files.TENSORS).write_bytes(b"")
    with pytest.raises(CheckpointError, match="not what was written") as error:
        run(running, ClientSettings(data=data, out=torn))
    assert error.value.hint is not None
    assert run(running, ClientSettings(data=data, out=tmp_path / "fresh")).score is not None


def test_another_job_under_the_invited_digest_is_refused(running: Serving, data: Path, tmp_path: Path) -> None:
    with running.link("anna"):
        service = running.running.service
    assert service is not None
    other = running.job.model_copy(update={"name": "other"})
    service.welcome = service.welcome.model_copy(update={"job": other.canonical().decode()})
    with pytest.raises(HandshakeError, match="another job than the invitation names"):
        run(running, ClientSettings(data=data, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
