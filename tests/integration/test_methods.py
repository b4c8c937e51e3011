"""Every training method through broker and server: resumed bit-equal, averaged, and what they do not allow."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.fidelity import BATCH, MODES, Case, make_job, random_rows
from benchmarks.plain import load_plain, train_plain
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import Background, Outcome, Serving, Site, serving, train_in_process, trunk_tensors
from shared import state_files
from shared.errors import JobError, Refused
from shared.identity import generate_identity
from shared.job import Job, parse_job
from shared.model.checkpoint import SINGLE, checkpoint_of
from worker_client.batches import batch_indices, pack_rows
from worker_client.generation import generate
from worker_client.head_tail import load_client_parts
from worker_client.local_trunk import LocalTrunk, trunk_of
from worker_client.policy import Policy, check_job
from worker_client.remote_trunk import RemoteTrunk
from worker_client.training import Training
from worker_server.no_trunk import NoTrunk
from worker_server.server import Server
from worker_server.settings import ServerSettings

WAIT_S = 60.0
METHODS = [
    "prompt",
    "prefix",
    "per-client prefixes",
    "rsLoRA",
    "DoRA",
    "from scratch",
    "plain FedAvg",
    "plain FedAvg, LoRA",
]


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
        trunk = trunk_of(link, running.job, parts, WAIT_S)
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


def test_plain_fedavg_is_the_mean_of_plain_runs(tmp_path: Path) -> None:
    """One round of two clients, each against plain PyTorch by itself, weighted by their target tokens."""
    job = job_of(save_tiny_model("llama", tmp_path / "model"), "plain FedAvg")
    job = job.model_copy(update={"rounds": job.rounds.model_copy(update={"count": 1})})
    clients = {name: Site(random_rows(8, seed)) for seed, name in enumerate(("a", "b"))}
    outcomes = train_in_process(job, clients, tmp_path)
    expected: dict[str, torch.Tensor] = {}
    tokens = {
        name: [[site.train[i] for i in batch_indices(8, BATCH, step, job.training.seed)] for step in range(2)]
        for name, site in clients.items()
    }
    weights = {name: sum(row.target_tokens for batch in batches for row in batch) for name, batches in tokens.items()}
    for name, batches in tokens.items():
        model = load_plain(job.model_name_or_path)
        train_plain(model, batches, job.training, job.total_steps, [list(model.parameters())])
        for key, value in model.named_parameters():
            part = value.detach() * weights[name] / sum(weights.values())
            expected[key] = expected[key] + part if key in expected else part
    for outcome in outcomes.values():
        assert outcome.parts.parameters.keys() == expected.keys()
        for key, value in outcome.parts.parameters.items():
            torch.testing.assert_close(value.detach(), expected[key], rtol=1e-4, atol=1e-5)


def test_in_plain_fedavg_the_server_holds_no_weights_and_answers_nobodys_hidden_states(tmp_path: Path) -> None:
    job = job_of(save_tiny_model("llama", tmp_path / "model"), "plain FedAvg, LoRA")
    batch = pack_rows(random_rows(2, 0))
    with serving(job, tmp_path, ["a"]) as running, running.link("a") as link:
        link.welcome.result()
        with pytest.raises(Refused) as refused:
            RemoteTrunk(link, job, WAIT_S).evaluate(torch.zeros(batch.tokens, 32), batch)
        assert refused.value.reason == "no_trunk"
        with pytest.raises(Refused) as refused:
            RemoteTrunk(link, job, WAIT_S).generate(torch.zeros(3, 32), [3], 9)
        assert refused.value.reason == "no_trunk"
        progress = running.running.progress
        assert progress is not None
        assert isinstance(progress.trunk, NoTrunk)
        tensors, _ = state_files.load(tmp_path / "server-state", 0)
        assert tensors == {}


@torch.no_grad()
def test_in_plain_fedavg_clients_generate_by_themselves(tmp_path: Path) -> None:
    job = job_of(save_tiny_model("llama", tmp_path / "model"), "plain FedAvg")
    parts = load_client_parts(checkpoint_of(job), job)
    with serving(job, tmp_path, ["a"]) as running, running.link("a") as link:
        trunk = trunk_of(link, job, parts, WAIT_S)
        written = generate(parts, trunk, [[5, 9, 2], [7]], max_new_tokens=6)
        assert isinstance(trunk, LocalTrunk)
        assert trunk.streams == {}
    plain = load_plain(job.model_name_or_path)
    for prompt, mine in zip(([5, 9, 2], [7]), written, strict=True):
        expected = plain.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert mine[: len(expected[0]) - len(prompt)] == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cohort": {"mode": "greedy"}}, r"cohort\.mode=greedy contradicts split\.trunk=client"),
        ({"cohort": {"adapters": "per_client"}}, r"cohort\.adapters=per_client contradicts split\.trunk=client"),
        ({"wire": {"hidden": "int8"}}, r"wire\.hidden=int8 contradicts split\.trunk=client: no hidden states travel"),
        ({"wire": {"gradient": "int4"}}, r"wire\.gradient=int4 contradicts split\.trunk=client"),
        (
            {"cohort": {"in_flight": 2}, "training": {"gradient_accumulation_steps": 2}},
            r"cohort\.in_flight=2 contradicts split\.trunk=client",
        ),
    ],
)
def test_what_contradicts_plain_fedavg_is_refused(change: dict[str, Any], said: str) -> None:
    values = {"model_name_or_path": "m", "split": {"trunk": "client"}}
    parse_job(values, "job.yaml")
    with pytest.raises(JobError, match=said):
        parse_job(values | change, "job.yaml")


def test_a_site_that_shares_no_updates_refuses_plain_fedavg() -> None:
    values = {"model_name_or_path": "m", "training": {"parts": ["trunk"]}}
    check_job(Policy(share_updates=False), parse_job(values, "job.yaml"))
    with pytest.raises(Refused, match="hands out updates of trunk, and share_updates is false"):
        check_job(Policy(share_updates=False), parse_job(values | {"split": {"trunk": "client"}}, "job.yaml"))
