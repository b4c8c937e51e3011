"""Every training method through broker and server: resumed bit-equal, averaged, and what they do not allow."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.fidelity import MODES, Case, make_job, random_rows
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import Background, Outcome, Serving, Site, serving, train_in_process, trunk_tensors
from shared.errors import JobError
from shared.identity import generate_identity
from shared.job import Job
from shared.model.checkpoint import SINGLE, checkpoint_of
from worker_client.head_tail import load_client_parts
from worker_client.remote_trunk import RemoteTrunk
from worker_client.training import Training
from worker_server.server import Server
from worker_server.settings import ServerSettings

WAIT_S = 60.0
METHODS = ["prompt", "prefix", "per-client prefixes", "rsLoRA", "DoRA", "from scratch"]


class Interrupted(Exception):
    """Stands for Ctrl-C at a client."""


def job_of(model: Path, name: str) -> Job:
    """The mode's, for two clients and three rounds of two steps."""
    mode = MODES[name]
    job = make_job(model, Case(mode.parts, 2, mode.settings, mode.method))
    return job.model_copy(update={"rounds": job.rounds.model_copy(update={"count": 3, "local_steps": 2})})


def model_of(method: str, folder: Path) -> Path:
    model = save_tiny_model("llama", folder / "model")
    if method == "from scratch":
        (model / SINGLE).unlink()
    return model


def sites() -> dict[str, Site]:
    return {name: Site(random_rows(8, seed), random_rows(3, 10 + seed)) for seed, name in enumerate(("a", "b"))}


def results(folder: Path, outcomes: dict[str, Outcome]) -> dict[str, torch.Tensor]:
    values = {f"trunk/{name}": value for name, value in trunk_tensors(folder).items()}
    for name, outcome in outcomes.items():
        values |= {f"{name}/{key}": p.detach().clone() for key, p in outcome.parts.parameters.items()}
    return values


def run_until(running: Serving, name: str, site: Site, folder: Path, stop_at: int) -> None:
    def report(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == stop_at:
            raise Interrupted

    parts = load_client_parts(checkpoint_of(running.job), running.job)
    with running.link(name) as link:
        trunk = RemoteTrunk(link, running.job, WAIT_S)
        Training(running.job, parts, trunk, site.train, site.validation, folder / name, report).run()


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_ends_bit_equal(method: str, tmp_path: Path) -> None:
    job = job_of(model_of(method, tmp_path), method)
    outcomes = train_in_process(job, sites(), tmp_path / "whole")
    whole = results(tmp_path / "whole", outcomes)
    scores = [event["loss"] for event in outcomes["a"].events if event["event"] == "evaluation"]
    assert scores[-1] != scores[0]
    for name in outcomes["a"].parts.parameters:
        assert torch.equal(whole[f"a/{name}"], whole[f"b/{name}"])

    folder = tmp_path / "cut"
    with serving(job, folder, ["a", "b"]) as running:
        clients = [Background(n, lambda n=n, s=s: run_until(running, n, s, folder, 3)) for n, s in sites().items()]
        for client in clients:
            with pytest.raises(Interrupted):
                client.join()
    again = results(folder, train_in_process(job, sites(), folder))
    assert again.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


def test_a_server_refuses_virtual_tokens_that_the_model_has_no_room_for(tmp_path: Path) -> None:
    job = job_of(save_tiny_model("llama", tmp_path / "model"), "prompt")
    job = job.model_copy(update={"method": job.method.model_copy(update={"num_virtual_tokens": 63})})
    server = Server(ServerSettings(state=tmp_path / "state"), job, generate_identity("server"), dict)
    with pytest.raises(JobError, match=r"method\.num_virtual_tokens=63 leaves no room"):
        server.run()
