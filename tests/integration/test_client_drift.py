"""FedProx and SCAFFOLD in whole runs, three clients and three rounds, against plain PyTorch on the whole model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.fidelity import random_rows
from benchmarks.plain import load_plain, mean_loss
from benchmarks.poisoning import Tampering
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import Background, Outcome, Site, serving, train_in_process, train_one
from shared import state_files
from shared.errors import ConnectionFailed
from shared.job import Job, parse_job
from worker_client.batches import batch_indices
from worker_client.data import Row
from worker_client.local_trunk import trunk_of
from worker_client.remote_trunk import Boundary, RemoteTrunk

NAMES = ("a", "b", "c")
ROUNDS, STEPS, RATE, MU = 3, 3, 0.05, 0.3
SGD = {"optim": "sgd", "max_grad_norm": None, "lr_scheduler_type": "constant", "learning_rate": RATE}
SCAFFOLD = {"type": "scaffold", "server_learning_rate": 0.8}

# A client's local steps: its name, the model, what is trained, and each step's rows.
Local = Callable[[str, Any, Mapping[str, nn.Parameter], list[list[Row]]], None]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "model")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are faster so, and leave the other cores to others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def job_of(model: Path, aggregation: dict[str, Any], **training: Any) -> Job:
    values = {
        "model_name_or_path": str(model),
        "method": {"type": "full"},
        "training": {"parts": ["head", "tail"], "per_device_train_batch_size": 4, **training},
        "rounds": {"count": ROUNDS, "local_steps": STEPS},
        "cohort": {"clients": len(NAMES)},
        "aggregation": aggregation,
    }
    return parse_job(values, "job")


def rows() -> dict[str, list[Row]]:
    return {name: random_rows(8, seed) for seed, name in enumerate(NAMES)}


def sites(**trunks: Any) -> dict[str, Site]:
    return {name: Site(mine, (), trunks.get(name, trunk_of)) for name, mine in rows().items()}


def steps_of(job: Job, mine: list[Row], round: int) -> list[list[Row]]:
    size, seed = job.training.per_device_train_batch_size, job.training.seed
    return [[mine[i] for i in batch_indices(len(mine), size, round * STEPS + step, seed)] for step in range(STEPS)]


def plainly(job: Job, names: Mapping[str, Any], local: Local, after: Callable[[dict[str, Tensor]], None]) -> Any:
    """The rounds of a job, one client after the other on one model; `after` hears each round's mean difference."""
    model = load_plain(job.model_name_or_path)
    model.requires_grad_(False)
    by_name = dict(model.named_parameters())
    trained = {name: by_name[name].requires_grad_() for name in names}
    rate = getattr(job.aggregation, "server_learning_rate", 1.0)
    for round in range(ROUNDS):
        x = {name: p.detach().clone() for name, p in trained.items()}
        total, sums = 0, {name: torch.zeros_like(value) for name, value in x.items()}
        for client, mine in rows().items():
            batches = steps_of(job, mine, round)
            for name, p in trained.items():
                p.data.copy_(x[name])
            local(client, model, trained, batches)
            tokens = sum(row.target_tokens for batch in batches for row in batch)
            total += tokens
            for name, p in trained.items():
                sums[name] += tokens * (p.detach() - x[name])
        mean = {name: value / total for name, value in sums.items()}
        for name, p in trained.items():
            p.data.copy_(x[name] + rate * mean[name])
        after(mean)
    return trained


def test_fedprox_is_the_proximal_term_in_the_loss(model: Path, tmp_path: Path) -> None:
    """AdamW with clipping, each client's moments its own; the loss is written out and differentiated."""
    job = job_of(model, {"type": "fedavg", "proximal_mu": MU}, learning_rate=1e-2, lr_scheduler_type="constant")
    outcome = train_in_process(job, sites(), tmp_path)["a"]
    moments: dict[str, Any] = {}

    def local(client: str, whole: Any, trained: Mapping[str, nn.Parameter], batches: list[list[Row]]) -> None:
        anchor = {name: p.detach().clone() for name, p in trained.items()}
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
        if client in moments:
            optimizer.load_state_dict(moments[client])
        for batch in batches:
            proximal = sum(((p - anchor[name]) ** 2).sum() for name, p in trained.items())
            optimizer.zero_grad()
            torch.autograd.backward(mean_loss(whole, batch) + MU / 2 * proximal)
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
        moments[client] = optimizer.state_dict()

    expected = plainly(job, outcome.parts.parameters, local, lambda mean: None)
    for name, value in outcome.parts.parameters.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=2e-5)
    without = train_in_process(
        job_of(model, {"type": "fedavg"}, learning_rate=1e-2, lr_scheduler_type="constant"), sites(), tmp_path / "0"
    )["a"]
    pairs = [(p.detach(), without.parts.parameters[name].detach()) for name, p in outcome.parts.parameters.items()]
    far = max(float((one - other).abs().max()) for one, other in pairs)
    assert far > 1e-3


def test_scaffold_is_algorithm_1_of_the_paper(model: Path, tmp_path: Path) -> None:
    job = job_of(model, SCAFFOLD, **SGD)
    outcome = train_in_process(job, sites(), tmp_path)["a"]
    server: dict[str, Tensor] = {}
    clients: dict[str, dict[str, Tensor]] = {name: {} for name in NAMES}
    changes: dict[str, dict[str, Tensor]] = {}

    def local(client: str, whole: Any, trained: Mapping[str, nn.Parameter], batches: list[list[Row]]) -> None:
        x = {name: p.detach().clone() for name, p in trained.items()}
        c, own = ({n: of.get(n, torch.zeros_like(v)) for n, v in x.items()} for of in (server, clients[client]))
        for batch in batches:
            gradients = torch.autograd.grad(mean_loss(whole, batch), list(trained.values()))
            with torch.no_grad():
                for (name, p), gradient in zip(trained.items(), gradients, strict=True):
                    p.sub_(RATE * (gradient - own[name] + c[name]))
        clients[client] = {n: own[n] - c[n] + (x[n] - p.detach()) / (STEPS * RATE) for n, p in trained.items()}
        changes[client] = {n: value - own[n] for n, value in clients[client].items()}

    def after(mean: dict[str, Tensor]) -> None:
        """c moves by the clients' changes, weighted as their values are."""
        number = len(seen)
        seen.append(number)
        weights = {
            client: sum(row.target_tokens for batch in steps_of(job, mine, number) for row in batch)
            for client, mine in rows().items()
        }
        for name, value in mean.items():
            moved = sum(w * changes[client][name] for client, w in weights.items()) / sum(weights.values())
            server[name] = server.get(name, torch.zeros_like(value)) + moved

    seen: list[int] = []
    expected = plainly(job, outcome.parts.parameters, local, after)
    for name, value in outcome.parts.parameters.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=2e-6)
    tensors, _ = state_files.load(tmp_path / "server-state", ROUNDS)
    own, _ = state_files.load(tmp_path / "b", ROUNDS)
    for name in expected:
        torch.testing.assert_close(tensors[f"aggregator/control/{name}"], server[name], rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(own[f"after/control/{name}"], clients["b"][name], rtol=1e-3, atol=2e-5)
    assert max(float(value.abs().max()) for value in server.values()) > 1e-2


def test_scaffold_killed_and_resumed_ends_bit_equal(model: Path, tmp_path: Path) -> None:
    job = job_of(model, SCAFFOLD, **SGD)
    whole = train_in_process(job, sites(), tmp_path / "whole")
    folder = tmp_path / "cut"
    with serving(job, folder, NAMES) as running:

        def stop_server(event: dict[str, Any]) -> None:
            if event["event"] == "step" and event["step"] == 2 * STEPS:
                running.running.stop()

        for client in [
            Background(name, partial(train_one, running, name, site, folder, stop_server))
            for name, site in sites().items()
        ]:
            with pytest.raises(ConnectionFailed):
                client.join()
    again = train_in_process(job, sites(), folder)
    for name, outcome in whole.items():
        for key, value in outcome.parts.parameters.items():
            assert torch.equal(value, again[name].parts.parameters[key])
        controls = [
            {k: v for k, v in state_files.load(path / name, ROUNDS)[0].items() if k.startswith("control/")}
            for path in (tmp_path / "whole", folder)
        ]
        assert controls[0].keys() == {f"control/{key}" for key in outcome.parts.parameters}
        assert all(torch.equal(value, controls[1][key]) for key, value in controls[0].items())


def test_a_client_whose_update_was_refused_keeps_the_control_that_the_server_knows(model: Path, tmp_path: Path) -> None:
    bad = Tampering(lambda before, after: torch.full_like(after, float("nan")))
    train_in_process(job_of(model, SCAFFOLD | {"secure": "off"}, **SGD), sites(c=bad), tmp_path)
    kept, _ = state_files.load(tmp_path / "c", ROUNDS)
    assert not any(name.startswith("control/") for name in kept)
    counted, _ = state_files.load(tmp_path / "a", ROUNDS)
    assert any(name.startswith("control/") for name in counted)


class Killed(Exception):
    """Stands for a kill at a client."""


@dataclass(frozen=True)
class Unlucky(RemoteTrunk):
    """Hands in no numbers after round 0 if `refused`; `killed` when the server has answered, and nobody heard it."""

    refused: bool = False
    killed: bool = False

    def update(self, round: int, weight: int, values: Mapping[str, Tensor]) -> Boundary:
        if self.refused and round == 0:
            values = {name: torch.full_like(value, float("nan")) for name, value in values.items()}
        boundary = super().update(round, weight, values)
        if self.killed:
            raise Killed
        return boundary


@pytest.mark.parametrize("refused", [True, False])
def test_a_client_killed_before_its_answer_learns_whether_its_update_counted(
    refused: bool, model: Path, tmp_path: Path
) -> None:
    """It comes back to the server, or to one that was started again; the run ends as if nobody had been killed."""
    job = job_of(model, SCAFFOLD, **SGD)
    job = job.model_copy(update={"cohort": job.cohort.model_copy(update={"clients": 1})})

    def site(killed: bool) -> Site:
        made = random_rows(8, 0)
        return Site(made, (), lambda link, job, parts, timeout_s: Unlucky(link, job, timeout_s, refused, killed))

    def results(folder: Path, client: Outcome) -> dict[str, Tensor]:
        kept, _ = state_files.load(folder / "a", ROUNDS)
        mine = {name: value for name, value in kept.items() if name.startswith("control")}
        return mine | {name: p.detach() for name, p in client.parts.parameters.items()}

    whole = results(tmp_path / "whole", train_in_process(job, {"a": site(False)}, tmp_path / "whole")["a"])
    assert any(name.startswith("control/") for name in whole)
    for restarted in (False, True):
        folder = tmp_path / f"restarted {restarted}"
        with serving(job, folder, ["a"]) as running:
            with pytest.raises(Killed):
                train_one(running, "a", site(True), folder)
            if not restarted:
                outcome = train_one(running, "a", site(False), folder)
        if restarted:
            outcome = train_in_process(job, {"a": site(False)}, folder)["a"]
        found = results(folder, outcome)
        assert found.keys() == whole.keys()
        assert [name for name in whole if not torch.equal(found[name], whole[name])] == []
