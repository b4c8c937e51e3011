"""Two server processes, a replica each: equal trunks after every round, and what two lone servers would average to."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fidelity import Case, make_job, write_random_rows
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from launcher import local_run
from launcher.cluster import Cluster
from shared import state_files
from shared.job import Job, Lora, Rounds, parse_job

NAMES = ["a", "b"]
WAIT_S = 120.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_tiny_model("llama", tmp_path / "model")
    save_word_tokenizer(folder)
    return folder


def site(folder: Path, name: str, count: int, seed: int) -> local_run.Site:
    path = write_random_rows(folder / f"{name}.jsonl", count, seed)
    return local_run.Site(name, path, path)


def job_of(model: Path, clients: int, rounds: int) -> Job:
    job = make_job(model, Case(("trunk",), clients))
    return job.model_copy(update={"rounds": Rounds(count=rounds, local_steps=3)})


def trunk_of(folder: Path, number: int) -> dict[str, Tensor]:
    tensors, _ = state_files.load(folder, number)
    return {name: value for name, value in tensors.items() if name.startswith("trunk/")}


def test_replicas_end_every_round_with_the_weighted_mean_of_their_trunks(model: Path, tmp_path: Path) -> None:
    sites = [site(tmp_path, name, 8, seed) for seed, name in enumerate(NAMES)]
    run = local_run.train_together(job_of(model, 2, 2), sites, tmp_path / "both", replicas=2)
    assert {info.name for info in run.processes if info.role == "server"} == {"server-0", "server-1"}
    state = tmp_path / "both" / "server-state"
    for number in (1, 2):
        first, second = (trunk_of(state / f"replica-{replica}", number) for replica in range(2))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    # After the first round: each alone with a server of its own, averaged by hand.
    alone, weights = [], []
    for each in sites:
        lone = local_run.train_together(job_of(model, 1, 2), [each], tmp_path / each.name)
        alone.append(trunk_of(tmp_path / each.name / "server-state", 1))
        weights.append(_target_tokens(lone.events[each.name]))
    after_one = trunk_of(state / "replica-0", 1)
    total = sum(weights)
    for name, value in after_one.items():
        expected = sum(w / total * one[name] for w, one in zip(weights, alone, strict=True))
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def _target_tokens(events: list[dict[str, Any]]) -> int:
    """Of the first round: every token but a row's first counts."""
    steps = [event for event in events if event.get("event") == "step" and event["round"] == 0]
    return sum(int(event["tokens"]) - 4 for event in steps)


@pytest.mark.slow
def test_a_replica_whose_clients_are_gone_holds_nobody_up(model: Path, tmp_path: Path) -> None:
    """A client is killed in the second of four rounds: the other comes to the end, and both replicas with it."""
    job = job_of(model, 2, 4).model_copy(update={"rounds": Rounds(count=4, local_steps=30)})
    job = job.model_copy(update={"cohort": job.cohort.model_copy(update={"quorum": 1})})
    sites = [site(tmp_path, name, 8, seed) for seed, name in enumerate(NAMES)]
    out = tmp_path / "run"
    local_run.prepare(job, sites, out)
    with Cluster(out / "logs", local_run.THREADS) as cluster:
        addresses = local_run.start_broker(cluster, out)
        servers = local_run.start_servers(cluster, out, addresses["servers"], 1, replicas=2)
        stays, goes = (local_run.start_client(cluster, out, job, each, addresses["clients"]) for each in sites)
        deadline = time.monotonic() + WAIT_S
        while stays.exit_code is None and time.monotonic() < deadline:
            for role, event in cluster.events(0.5):
                if role is goes and event.get("event") == "step" and event["step"] >= 35:
                    goes.process.kill()
        for role in (stays, *servers):
            assert role.process.wait(WAIT_S) == 0, role.last_words()
    for replica in range(2):
        assert state_files.numbers(out / "server-state" / f"replica-{replica}")[-1] == 4


def averages_of(folder: Path, number: int) -> dict[str, Tensor]:
    tensors, _ = state_files.load(folder, number)
    return {name: value for name, value in tensors.items() if name.startswith("average/")}


@pytest.mark.slow
def test_replicas_mask_each_among_its_own_clients(model: Path, tmp_path: Path) -> None:
    """LoRA in head and tail, which who shares a trunk with whom does not change: averages are those without masks."""
    values = make_job(model, Case(("head", "tail"), 6, method=Lora(r=2))).model_dump(mode="json")
    values["rounds"] |= {"count": 2, "local_steps": 2}
    values["cohort"]["replicas"] = 2
    sites = [site(tmp_path, name, 8, seed) for seed, name in enumerate("abcdef")]
    found = {}
    for secure in ("secagg", "ring", "off"):
        job = parse_job(values | {"aggregation": {"type": "fedavg", "secure": secure}}, "job")
        local_run.train_together(job, sites, tmp_path / secure, replicas=2)
        state = tmp_path / secure / "server-state"
        first, second = (averages_of(state / f"replica-{replica}", 1) for replica in range(2))
        assert first
        assert all(torch.equal(value, second[name]) for name, value in first.items())
        found[secure] = first
    # Which clients meet at a replica is chance, and with it the order of sums.
    for masked in ("secagg", "ring"):
        assert found[masked].keys() == found["off"].keys()
        for name, value in found["off"].items():
            torch.testing.assert_close(found[masked][name], value, rtol=1e-4, atol=1e-7)
