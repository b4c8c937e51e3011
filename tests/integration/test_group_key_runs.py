"""Runs under a group's key: the same model as without, a server that has nothing to read, and whoever is killed."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.fidelity import Case, make_job, random_rows
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import Background, Outcome, Serving, Site, serving, train_in_process, train_one, trunk_tensors
from shared import state_files
from shared.errors import AggregationError, CheckpointError, ConnectionFailed, SchemaError
from shared.group_keys import fingerprint
from shared.job import Job, Lora, parse_job
from shared.payload.messages import Mask, Masking, Sealed, Unopened, pack
from shared.secure_aggregation.group_key import GroupKey
from shared.secure_aggregation.messages import GroupSum, Unmask
from worker_client.head_tail import HeadTail
from worker_client.link import Link
from worker_client.local_trunk import trunk_of
from worker_client.remote_trunk import RemoteTrunk
from worker_server import service
from worker_server.box import SEALED
from worker_server.masking import RoundSum
from worker_server.progress import BOUND, Progress
from worker_server.rounds import Rounds

NAMES = ("a", "b", "c")
KEY = GroupKey(bytes(range(32)))
OTHER = GroupKey(bytes(32))
# What fixed point costs in two or three rounds, on values of 0.1 and less.
CLOSE = 1e-6

Trunk = Callable[[Link, Job, HeadTail, float], RemoteTrunk]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "model")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def job_of(model: Path, clients: int = 3, count: int = 2, key: GroupKey | None = KEY, **sections: Any) -> Job:
    values = make_job(model, Case(("head", "trunk", "tail"), clients, method=Lora(r=2))).model_dump(mode="json")
    values["rounds"] |= {"count": count, "local_steps": 2}
    values["aggregation"] |= {"group_key": None if key is None else fingerprint(key)}
    for section, change in sections.items():
        values[section] = change if section == "privacy" else values[section] | change
    return parse_job(values, "job")


def sites(names: tuple[str, ...] = NAMES, key: GroupKey | None = KEY, **trunks: Trunk) -> dict[str, Site]:
    return {
        name: Site(random_rows(8, seed), random_rows(2, 9), trunks.get(name, trunk_of), group_key=key)
        for seed, name in enumerate(names)
    }


def results(folder: Path, outcomes: Mapping[str, Outcome]) -> dict[str, Tensor]:
    trained = {f"trunk/{name}": value for name, value in trunk_tensors(folder).items()}
    for name, outcome in outcomes.items():
        trained |= {f"{name}/{key}": p.detach().clone() for key, p in outcome.parts.parameters.items()}
    return trained


def furthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


KINDS: dict[str, dict[str, Any]] = {
    "lockstep": {},
    "an even number": {"clients": 4},
    "per-client adapters": {"cohort": {"adapters": "per_client"}, "rounds": {"weighting": "rows"}},
    "plain fedavg": {"split": {"trunk": "client"}},
    "secagg+, a personal tail": {"aggregation": {"secure": "secagg+", "personal": ["tail"]}},
    "sampled": {"clients": 4, "count": 3, "cohort": {"sampled": 3}},
    "local privacy": {
        "privacy": {"type": "local", "clip_norm": 1.0, "noise_multiplier": 0.01, "delta": 1e-5},
        "rounds": {"weighting": "clients"},
        "training": {"parts": ["head", "tail"]},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_as_without_a_group_key(kind: str, model: Path, tmp_path: Path) -> None:
    """To the error of fixed point; all end with the same; and something was trained."""
    settings = KINDS[kind]
    names = ("a", "b", "c", "d")[: settings.get("clients", 3)]
    job = job_of(model, **settings)
    outcomes = train_in_process(job, sites(names), tmp_path / "group")
    group = results(tmp_path / "group", outcomes)
    first = results(
        tmp_path / "one", train_in_process(job_of(model, **settings | {"count": 1}), sites(names), tmp_path / "one")
    )
    assert furthest(group, first) > 100 * CLOSE
    shared = [outcomes[name].parts.shared for name in names]
    assert all(torch.equal(shared[0][key], other[key]) for other in shared for key in shared[0])
    if kind == "local privacy":  # its noise is another each time
        return
    clear_sites = sites(names, key=None)
    clear_job = job_of(model, key=None, **settings)
    clear = results(tmp_path / "clear", train_in_process(clear_job, clear_sites, tmp_path / "clear"))
    assert furthest(group, clear) < CLOSE
