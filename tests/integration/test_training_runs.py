"""Whole jobs in one process: exact against plain PyTorch, exact when interrupted, alive when a client is not."""

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fidelity import ALL, CASES, GOAL, MODES, Case, compare, make_job, random_rows
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import Background, Outcome, Serving, Site, serving, train_in_process, trunk_tensors
from shared import state_files
from shared.errors import ConnectionFailed, FlglmError, Refused
from shared.job import Job
from shared.model.checkpoint import Checkpoint
from shared.payload.messages import Forward
from shared.payload.tensors import encode
from worker_client.batches import pack_rows
from worker_client.head_tail import load_client_parts
from worker_client.remote_trunk import RemoteTrunk
from worker_client.steps import Report
from worker_client.training import Training

WAIT_S = 60.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "model")


def job_of(model: Path, *, clients: int = 2, rounds: int = 3, steps: int = 3, **changes: Any) -> Job:
    job = make_job(model, Case(ALL, clients))
    return job.model_copy(
        update={"rounds": job.rounds.model_copy(update={"count": rounds, "local_steps": steps}), **changes}
    )


def few_suffice(job: Job, **changes: Any) -> Job:
    """A round goes on as long as a member is left."""
    return job.model_copy(update={"cohort": job.cohort.model_copy(update={"quorum": 1, **changes})})


def sites() -> dict[str, Site]:
    return {name: Site(random_rows(8, seed), random_rows(3, 10 + seed)) for seed, name in enumerate(("a", "b"))}


def results(folder: Path, outcomes: dict[str, Outcome]) -> dict[str, Tensor]:
    trained = {f"trunk/{name}": value for name, value in trunk_tensors(folder).items()}
    for name, outcome in outcomes.items():
        trained |= {f"{name}/{key}": p.detach().clone() for key, p in outcome.parts.parameters.items()}
    return trained


class Interrupted(Exception):
    """Stands for Ctrl-C at a client."""


def run_until(running: Serving, job: Job, name: str, site: Site, folder: Path, stop_at: tuple[int, int] | None) -> None:
    """A client's whole run; interrupted when it reports the given (round, step)."""

    def report(event: dict[str, Any]) -> None:
        if stop_at is not None and event["event"] == "step" and (event["round"], event["step"]) == stop_at:
            raise Interrupted

    train(running, job, name, site, folder, report)


def train(running: Serving, job: Job, name: str, site: Site, folder: Path, report: Report) -> None:
    parts = load_client_parts(Checkpoint(job.model_name_or_path), job)
    with running.link(name) as link:
        trunk = RemoteTrunk(link, job, WAIT_S)
        Training(job, parts, trunk, site.train, site.validation, folder / name, report).run()


@pytest.mark.parametrize("case", [*CASES, *(name for name, mode in MODES.items() if mode.exact)])
def test_split_training_equals_plain_pytorch(case: str, tmp_path: Path) -> None:
    assert compare("llama", case, tmp_path).loss <= GOAL


@pytest.mark.parametrize("case", [name for name, mode in MODES.items() if not mode.exact])
def test_the_other_modes_stay_near_plain_pytorch(case: str, tmp_path: Path) -> None:
    """Random weights hardly learn in 20 steps: this shows that nothing is wrong by a factor, and no more."""
    assert compare("llama", case, tmp_path).loss <= 0.02


@pytest.mark.parametrize("stop_at", [(1, 3), (1, 4), (2, 8)], ids=["first step", "mid-round", "last step"])
def test_an_interrupted_run_ends_bit_equal(stop_at: tuple[int, int], model: Path, tmp_path: Path) -> None:
    job = job_of(model)
    whole = results(tmp_path / "whole", train_in_process(job, sites(), tmp_path / "whole"))

    folder = tmp_path / "cut"
    with serving(job, folder, ["a", "b"]) as running:
        clients = [
            Background(n, lambda n=n, s=s: run_until(running, job, n, s, folder, stop_at)) for n, s in sites().items()
        ]
        for client in clients:
            with pytest.raises(Interrupted):
                client.join()
    assert state_files.numbers(folder / "server-state")[-1] >= 1
    resumed = train_in_process(job, sites(), folder)
    assert any(event["event"] == "resumed" for event in resumed["a"].events)

    again = results(folder, resumed)
    assert again.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


@pytest.mark.parametrize("round_", [0, 1])
def test_stopped_between_the_clients_checkpoints_and_the_average_it_ends_bit_equal(
    round_: int, model: Path, tmp_path: Path
) -> None:
    """The clients are a round ahead of the server, then, and go back with it."""
    job = job_of(model)
    whole = results(tmp_path / "whole", train_in_process(job, sites(), tmp_path / "whole"))

    folder = tmp_path / "cut"
    last = (round_, (round_ + 1) * job.rounds.local_steps - 1)
    with serving(job, folder, ["a", "b"]) as running:

        def stop_server(event: dict[str, Any]) -> None:
            if event["event"] == "step" and (event["round"], event["step"]) == last:
                running.running.stop()

        for client in [
            Background(n, partial(train, running, job, n, s, folder, stop_server)) for n, s in sites().items()
        ]:
            with pytest.raises(ConnectionFailed):
                client.join()
    assert state_files.numbers(folder / "server-state")[-1] == round_
    assert state_files.numbers(folder / "a")[-1] == round_ + 1
    again = results(folder, train_in_process(job, sites(), folder))
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


def stopped_after_two_rounds(job: Job, folder: Path) -> None:
    """Server and clients killed in the third round: three checkpoints at clients, two at the server."""
    with serving(job, folder, ["a", "b"]) as running:
        clients = [
            Background(n, lambda n=n, s=s: run_until(running, job, n, s, folder, (2, 7))) for n, s in sites().items()
        ]
        for client in clients:
            with pytest.raises(Interrupted):
                client.join()


def spoil(folder: Path) -> int:
    """The newest checkpoint's tensors are cut off."""
    number = state_files.numbers(folder)[-1]
    path = folder / f"checkpoint-{number}" / state_files.TENSORS
    path.write_bytes(path.read_bytes()[:-1])
    return number


def test_a_corrupt_last_checkpoint_of_the_server_costs_a_round_and_nothing_else(model: Path, tmp_path: Path) -> None:
    job = job_of(model)
    whole = results(tmp_path / "whole", train_in_process(job, sites(), tmp_path / "whole"))
    folder = tmp_path / "cut"
    stopped_after_two_rounds(job, folder)
    assert spoil(folder / "server-state") == 2
    resumed = train_in_process(job, sites(), folder)
    again = results(folder, resumed)
    assert [event["round"] for event in resumed["a"].events if event["event"] == "round"] == [1, 2]
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


def test_a_corrupt_last_checkpoint_of_a_client_is_said_and_the_one_before_used(model: Path, tmp_path: Path) -> None:
    job, folder = job_of(model), tmp_path / "cut"
    stopped_after_two_rounds(job, folder)
    assert spoil(folder / "a") == 2
    events = train_in_process(job, sites(), folder)["a"].events
    assert [event["event"] for event in events if event["event"] != "step"][:5] == [
        "checkpoint_unreadable", "resumed", "checkpoint_unreadable", "rounds_missed", "round",
    ]  # fmt: skip
    assert (events[0]["number"], events[1]["rounds"]) == (2, 1)
    assert "checkpoint-2" in events[0]["reason"]
    assert events[-1]["event"] == "finished"


def test_a_round_that_lost_its_only_client_is_undone_and_ends_bit_equal(model: Path, tmp_path: Path) -> None:
    job = job_of(model, clients=1)
    only = {"a": sites()["a"]}
    train_in_process(job, only, tmp_path / "whole")
    with serving(job, tmp_path / "cut", ["a"]) as running:
        for stop_at in ((0, 1), (1, 4), None):
            client = Background("a", lambda s=stop_at: run_until(running, job, "a", only["a"], tmp_path / "cut", s))
            with contextlib.suppress(Interrupted):
                client.join()
        running.service.join()
    whole, again = trunk_tensors(tmp_path / "whole"), trunk_tensors(tmp_path / "cut")
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


def test_a_client_that_vanishes_does_not_stall_the_others_and_may_come_back(model: Path, tmp_path: Path) -> None:
    job = few_suffice(job_of(model, rounds=4))
    clients = sites()
    with serving(job, tmp_path, ["a", "b"]) as running:
        stays = Background("a", lambda: run_until(running, job, "a", clients["a"], tmp_path, None))
        with pytest.raises(Interrupted):
            run_until(running, job, "b", clients["b"], tmp_path, (1, 3))
        run_until(running, job, "b", clients["b"], tmp_path, None)
        stays.join()
        running.service.join()
        assert running.running.finished


def test_a_client_that_hangs_is_left_behind_at_the_deadline(model: Path, tmp_path: Path) -> None:
    job = few_suffice(job_of(model), deadline_s=0.3)
    with serving(job, tmp_path, ["a", "b"]) as running, running.link("b") as hanging:
        joined = Background("b", lambda: RemoteTrunk(hanging, job, WAIT_S).join(3))
        run_until(running, job, "a", sites()["a"], tmp_path, None)
        joined.join()
        assert running.running.finished


def test_a_client_that_joins_twice_replaces_its_old_session(model: Path, tmp_path: Path) -> None:
    job = job_of(model, clients=1)
    with serving(job, tmp_path, ["a"]) as running, running.link("a") as old:
        RemoteTrunk(old, job, WAIT_S).join(3)
        run_until(running, job, "a", sites()["a"], tmp_path, None)
        with pytest.raises(FlglmError, match="joined with another session"):
            RemoteTrunk(old, job, WAIT_S).join(3)


@pytest.mark.parametrize("wire_format", ["bfloat16", "float16"])
def test_smaller_wire_formats_train_too(wire_format: str, model: Path, tmp_path: Path) -> None:
    job = job_of(model, rounds=1, steps=10)
    small = job.model_copy(
        update={"wire": job.wire.model_copy(update={"hidden": wire_format, "gradient": wire_format})}
    )
    exact = train_in_process(job, sites(), tmp_path / "exact")["a"].events
    near = train_in_process(small, sites(), tmp_path / "near")["a"].events
    exact_losses, near_losses = ([e["loss"] for e in events if e["event"] == "step"] for events in (exact, near))
    assert near_losses != exact_losses
    assert near_losses == pytest.approx(exact_losses, rel=0.01)


def test_only_real_tokens_travel(model: Path, tmp_path: Path) -> None:
    job = job_of(model, clients=1)
    batch = pack_rows(random_rows(5, 0))
    width = 32
    with serving(job, tmp_path, ["a"]) as running, running.link("a") as link:
        trunk = RemoteTrunk(link, job, WAIT_S)
        before = link.connection.bytes_sent
        trunk.evaluate(torch.randn(batch.tokens, width), batch)
        sent = link.connection.bytes_sent - before
    tags_and_message = sent - batch.tokens * width * 4
    assert 32 < tags_and_message < 400


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"hidden": float("nan")}, "tensor"),
        ({"lengths": (3,)}, "tensor"),
        ({"target_tokens": 99}, "target_tokens"),
        ({"lengths": (40,), "rows": 40}, "too_long"),
        ({"purpose": "train"}, "not_in_round"),
    ],
)
def test_a_bad_request_is_refused_and_others_train_on(
    change: dict[str, Any], code: str, model: Path, tmp_path: Path
) -> None:
    job = job_of(model, clients=1)
    job = job.model_copy(update={"data": job.data.model_copy(update={"max_length": 32})})
    calm = results(tmp_path / "calm", train_in_process(job, {"a": sites()["a"]}, tmp_path / "calm"))
    rows = change.get("rows", 5)
    hidden = torch.full((rows, 32), change.get("hidden", 0.5))
    with serving(job, tmp_path / "run", ["a", "bad"]) as running, running.link("bad") as bad:
        trained = Background("a", lambda: run_until(running, job, "a", sites()["a"], tmp_path / "run", None))
        info, frame = encode("hidden", hidden, "float32")
        message = Forward(
            request=bad.next_request(),
            purpose=change.get("purpose", "evaluate"),
            lengths=change.get("lengths", (5,)),
            target_tokens=change.get("target_tokens", 1),
            tensors=(info,),
        )
        with pytest.raises(Refused) as refused:
            bad.wait(bad.send(message, [frame]), WAIT_S, "no answer")
        trained.join()
    assert refused.value.reason == code
    for name, value in trunk_tensors(tmp_path / "run").items():
        assert torch.equal(value, calm[f"trunk/{name}"])
