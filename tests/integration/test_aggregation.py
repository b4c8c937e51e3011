"""Aggregation in whole runs: its state survives kills to the bit, it holds for per-client adapters too, and an update
that is refused stops nobody."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fidelity import Case, make_job, random_rows
from benchmarks.poisoning import Tampering
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import Background, Outcome, Site, serving, train_in_process, train_one, trunk_tensors
from shared import state_files
from shared.errors import ConnectionFailed, JobError
from shared.identity import generate_identity
from shared.job import Job, Lora, parse_job
from worker_client.local_trunk import trunk_of
from worker_server.server import Server
from worker_server.settings import ServerSettings

NAMES = ("a", "b", "c")
LORA = Lora(r=2)
AGGREGATIONS: dict[str, dict[str, Any]] = {
    "fedavgm": {"type": "fedavgm"},
    "fedadam": {"type": "fedadam"},
    "fedadam, bounded": {"type": "fedadam", "max_update_norm": 0.5, "secure": "off"},
    "median": {"type": "median", "secure": "off"},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "model")


def job_of(model: Path, aggregation: dict[str, Any], rounds: int = 3, **cohort: Any) -> Job:
    """Per-client LoRA in the trunk, LoRA in head and tail: all of it is aggregated."""
    job = make_job(model, Case(("head", "trunk", "tail"), len(NAMES), method=LORA))
    values = job.model_dump(mode="json")
    values["rounds"] |= {"count": rounds, "local_steps": 2}
    values["cohort"] |= {"adapters": "per_client", **cohort}
    return parse_job(values | {"aggregation": aggregation}, "job")


def sites(**tampering: Any) -> dict[str, Site]:
    return {
        name: Site(random_rows(8, seed), random_rows(3, 10 + seed), tampering.get(name, trunk_of))
        for seed, name in enumerate(NAMES)
    }


def results(folder: Path, outcomes: dict[str, Outcome]) -> dict[str, Tensor]:
    trained = {f"trunk/{name}": value for name, value in trunk_tensors(folder).items()}
    for name, outcome in outcomes.items():
        trained |= {f"{name}/{key}": p.detach().clone() for key, p in outcome.parts.parameters.items()}
    return trained


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_killed_and_resumed_it_ends_bit_equal(aggregation: str, model: Path, tmp_path: Path) -> None:
    job = job_of(model, AGGREGATIONS[aggregation])
    whole = results(tmp_path / "whole", train_in_process(job, sites(), tmp_path / "whole"))
    folder = tmp_path / "cut"
    with serving(job, folder, NAMES) as running:

        def stop_server(event: dict[str, Any]) -> None:
            if event["event"] == "step" and (event["round"], event["step"]) == (2, 4):
                running.running.stop()

        for client in [
            Background(name, partial(train_one, running, name, site, folder, stop_server))
            for name, site in sites().items()
        ]:
            with pytest.raises(ConnectionFailed):
                client.join()
    assert state_files.numbers(folder / "server-state")[-1] == 2
    again = results(folder, train_in_process(job, sites(), folder))
    assert different(whole, again) == []


def test_what_all_go_on_from_is_what_the_method_makes_of_their_updates(model: Path, tmp_path: Path) -> None:
    """One round of FedAvgM at rate 0.5 from the initial values, head, tail and trunk: half of FedAvg's change."""
    plain = job_of(model, {"type": "fedavg"}, rounds=1)
    half = job_of(model, {"type": "fedavgm", "server_learning_rate": 0.5}, rounds=1)
    means = results(tmp_path / "plain", train_in_process(plain, sites(), tmp_path / "plain"))
    halves = results(tmp_path / "half", train_in_process(half, sites(), tmp_path / "half"))
    starts, _ = state_files.load(tmp_path / "half" / "a", 0)
    trunk, _ = state_files.load(tmp_path / "half" / "server-state", 0)
    moved = 0
    for name, mean in means.items():
        owner, _, key = name.partition("/")
        start = trunk[name] if owner == "trunk" else starts[f"trained/{key}"]
        torch.testing.assert_close(halves[name], start + (mean - start) / 2, rtol=1e-5, atol=1e-7)
        moved += int(not torch.equal(mean, start))
    assert moved == len(means)


def spoil(value: float, _: Tensor, after: Tensor) -> Tensor:
    return torch.full_like(after, value)


def stretch(_: Tensor, after: Tensor) -> Tensor:
    return torch.cat([after, after])


@pytest.mark.parametrize("bad", [partial(spoil, float("nan")), partial(spoil, float("inf")), stretch])
def test_a_refused_update_is_counted_and_stops_nobody(bad: Any, model: Path, tmp_path: Path) -> None:
    """c's updates are refused in every round: a and b are averaged, c stays to the end and has their average."""
    job = job_of(model, {"type": "fedavg", "secure": "off"})
    clients = sites(c=Tampering(bad))
    outcomes: dict[str, Outcome] = {}
    with serving(job, tmp_path, NAMES) as running:

        def run(name: str) -> None:
            outcomes[name] = train_one(running, name, clients[name], tmp_path)

        for client in [Background(name, partial(run, name)) for name in NAMES]:
            client.join()
        service = running.running.service
        running.service.join()
        assert service is not None
        assert service.counters["refused_tensor"] == job.rounds.count
    refused = [event for event in outcomes["c"].events if event["event"] == "update_refused"]
    assert [event["round"] for event in refused] == [0, 1, 2]
    assert all(event["reason"] for event in refused)
    assert not any(event["event"] == "update_refused" for name in "ab" for event in outcomes[name].events)
    assert [e["members"] for e in outcomes["a"].events if e["event"] == "round"] == [3, 3, 3]
    trained = {name: outcome.parts.parameters for name, outcome in outcomes.items()}
    assert all(torch.equal(value, trained["c"][name]) for name, value in trained["a"].items())
    assert all(bool(value.isfinite().all()) for value in results(tmp_path, outcomes).values())


def test_a_weight_that_no_round_can_have_is_refused(model: Path, tmp_path: Path) -> None:
    job = job_of(model, {"type": "fedavg", "secure": "off"}, rounds=1)
    outcomes = train_in_process(job, sites(b=Tampering(weight=2**40)), tmp_path)
    reasons = [event["reason"] for event in outcomes["b"].events if event["event"] == "update_refused"]
    assert len(reasons) == 1
    assert "a weight of 1099511627776" in reasons[0]


def test_where_all_updates_are_refused_all_stay_where_they_were(model: Path, tmp_path: Path) -> None:
    bad = Tampering(partial(spoil, float("nan")))
    job = job_of(model, {"type": "fedadam", "secure": "off"}, rounds=2)
    outcomes = train_in_process(job, sites(a=bad, b=bad, c=bad), tmp_path)
    start, _ = state_files.load(tmp_path / "a", 0)
    for outcome in outcomes.values():
        for name, value in outcome.parts.parameters.items():
            assert torch.equal(value, start[f"trained/{name}"])


@pytest.mark.parametrize(
    ("aggregation", "adapters", "said"),
    [
        ({"type": "median", "secure": "off"}, "per_client", "each of 2 replicas has only its own clients'"),
        ({"type": "fedavg", "lora": "exact", "secure": "off"}, "shared", "does not reach a shared trunk"),
        ({"type": "fedavg"}, "shared", "the job says cohort.replicas=1"),
    ],
)
def test_what_replicas_cannot_do_is_refused_before_they_meet(
    aggregation: dict[str, Any], adapters: str, said: str, model: Path, tmp_path: Path
) -> None:
    settings = ServerSettings(replicas=2, rendezvous="tcp://127.0.0.1:1", state=tmp_path / "state")
    server = Server(settings, job_of(model, aggregation, adapters=adapters), generate_identity("server"), dict)
    with pytest.raises(JobError, match=said):
        server.run()
