"""Hosts in network namespaces, with delay, loss and cables that are cut: training goes on, and ends with the same bits.

A broker, two servers with a replica of the trunk each, and four clients, every one a process with an address of its own;
links with keys, everything trained, fp32, in lockstep. What they end with is compared to the same on calm cables.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.fidelity import ALL, Case, make_job, write_random_rows
from benchmarks.hosts import CABLE, CALM, Hosts, Unavailable, Weather
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from launcher import local_run
from launcher.cluster import Cluster, Role
from shared import state_files
from shared.job import Job, Rounds

SERVERS = ("server-0", "server-1")
CLIENTS = ("north", "valley", "coast", "hill")
HOSTS = ("broker", *SERVERS, *CLIENTS)
STORM = Weather(delay_ms=20, jitter_ms=5, loss=0.02)
ROUNDS, LOCAL_STEPS = 3, 6
WAIT_S = 180.0


@pytest.fixture(autouse=True)
def namespaces() -> None:
    try:
        with Hosts(("one", "other")):
            pass
    except Unavailable as error:
        pytest.skip(f"no network namespaces here: {error}")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    model = save_tiny_model("llama", tmp_path / "model")
    save_word_tokenizer(model)
    made = make_job(model, Case(ALL, len(CLIENTS)))
    return made.model_copy(update={"rounds": Rounds(count=ROUNDS, local_steps=LOCAL_STEPS, evaluate_every=ROUNDS)})


@pytest.fixture
def rows(tmp_path: Path) -> list[local_run.Site]:
    paths = {name: write_random_rows(tmp_path / f"{name}.jsonl", 12, seed) for seed, name in enumerate(CLIENTS)}
    return [local_run.Site(name, path, path) for name, path in paths.items()]


class Layout:
    """The processes on their hosts."""

    def __init__(self, hosts: Hosts, cluster: Cluster, job: Job, rows: list[local_run.Site], out: Path) -> None:
        self.hosts = hosts
        self.cluster = cluster
        broker = hosts.address("broker")
        doors = [f"tcp://{broker}:{port}" for port in (5555, 5556)]
        cluster.wait_for(self._start("broker", local_run.broker_words(out, *doors)), "ready", WAIT_S)
        words = local_run.server_words(out, doors[1], 1)
        words += ["--replicas", str(len(SERVERS)), "--rendezvous", f"tcp://{hosts.address(SERVERS[0])}:29500"]
        for number, name in enumerate(SERVERS):
            self._start(name, [*words, "--replica", str(number)])
        for site in rows:  # one after the other: each replica gets the same clients in every run
            began = time.monotonic()
            client = self._start(site.name, local_run.client_words(out, job, site, doors[0]))
            cluster.wait_for(client, "data", WAIT_S)
            print(site.name, time.monotonic() - began)

    def _start(self, name: str, words: list[str]) -> Role:
        return self.cluster.start(words[0], name, words, self.hosts.within(name))

    def role(self, name: str) -> Role:
        return next(role for role in self.cluster.roles if role.name == name)

    def events(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What clients report until all but the broker have ended. Raises RoleFailed."""
        deadline = time.monotonic() + WAIT_S
        workers = [role for role in self.cluster.roles if role.name != "broker"]
        while any(role.exit_code is None for role in workers):
            assert time.monotonic() < deadline
            self.cluster.check()
            for role, event in self.cluster.events(0.1):
                yield role.name, event


@contextmanager
def laid_out(job: Job, rows: list[local_run.Site], out: Path, weather: Weather) -> Iterator[Layout]:
    local_run.prepare(job, rows, out)
    surroundings = {**local_run.THREADS, "GLOO_SOCKET_IFNAME": CABLE}
    with Hosts(HOSTS, weather) as hosts, Cluster(out / "logs", surroundings) as cluster:
        yield Layout(hosts, cluster, job, rows, out)


def trained(out: Path) -> dict[str, Tensor]:
    """All that a run trained, at both servers and at the clients."""
    found: dict[str, Tensor] = {}
    for number, name in enumerate(SERVERS):
        tensors, _ = state_files.load(out / "server-state" / f"replica-{number}", ROUNDS)
        found |= {f"{name}/{key}": value for key, value in tensors.items()}
    for name in CLIENTS:
        parts = load_file(out / "results" / name / "trained.safetensors")
        found |= {f"{name}/{key}": value for key, value in parts.items()}
    return found


def test_delay_loss_and_cut_cables_change_nothing(job: Job, rows: list[local_run.Site], tmp_path: Path) -> None:
    began = time.monotonic()
    with laid_out(job, rows, tmp_path / "calm", CALM) as layout:
        for _ in layout.events():
            pass
    print("calm", time.monotonic() - began)
    calm = trained(tmp_path / "calm")
    assert calm
