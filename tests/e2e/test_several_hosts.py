"""Hosts in network namespaces, with delay, loss and cables that are cut: training goes on and ends with the same bits.

A broker, two servers with a replica of the trunk each and four clients, every one a process with an address of its own;
links with keys, everything trained, fp32, in lockstep. What they end with is compared to the same on calm cables.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.fidelity import ALL, Case, make_job, write_random_rows
from benchmarks.hosts import CALM, Hosts, Unavailable, Weather
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from launcher import local_run
from launcher.cluster import Cluster, Role
from shared import state_files
from shared.job import FedAvg, Job, Rounds

SERVERS = ("server-0", "server-1")
CLIENTS = ("north", "valley", "coast", "hill")
HOSTS = ("broker", *SERVERS, *CLIENTS)
STORM = Weather(delay_ms=20, jitter_ms=5, loss=0.02)
ROUNDS, LOCAL_STEPS = 3, 5
SHORT_CUT_S = 4.0
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
    rounds = Rounds(count=ROUNDS, local_steps=LOCAL_STEPS, evaluate_every=ROUNDS)
    # Two clients at each replica: too few for a sum to hide anything.
    return made.model_copy(update={"rounds": rounds, "aggregation": FedAvg(secure="off")})


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
            client = self._start(site.name, local_run.client_words(out, job, site, doors[0]))
            cluster.wait_for(client, "data", WAIT_S)

    def _start(self, name: str, words: list[str]) -> Role:
        return self.cluster.start(words[0], name, words, self.hosts.within(name))

    def reports(self, name: str, event: str) -> list[dict[str, Any]]:
        """What a client has said of one kind."""
        (role,) = (role for role in self.cluster.roles if role.name == name)
        return [said for said in list(role.events) if said.get("event") == event]

    def resumed(self, name: str) -> list[int]:
        """After how many rounds a client came back."""
        return [said["rounds"] for said in self.reports(name, "resumed")]

    def has_done(self, name: str, step: int) -> bool:
        return any(said["step"] >= step for said in self.reports(name, "step"))

    def has_logged(self, name: str, **fields: str) -> bool:
        """Whether the role's log has a line with these fields."""
        lines = (self.cluster.logs / f"{name}.log").read_text().splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return any(event | fields == event for event in events)

    def done(self) -> bool:
        return all(role.exit_code == 0 for role in self.cluster.roles if role.name != "broker")

    @staticmethod
    def passed(seconds: float) -> Callable[[], bool]:
        end = time.monotonic() + seconds
        return lambda: time.monotonic() > end

    def cut(self, name: str, over: Callable[[], bool]) -> None:
        """The host's cable is out until `over`."""
        self.hosts.cut(name)
        self.until(over)
        self.hosts.mend(name)

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait for it. Raises RoleFailed if a process fails meanwhile."""
        deadline = time.monotonic() + WAIT_S
        while not reached():
            assert time.monotonic() < deadline
            self.cluster.check()
            for _ in self.cluster.events(0.1):
                pass


@contextmanager
def laid_out(job: Job, rows: list[local_run.Site], out: Path, weather: Weather) -> Iterator[Layout]:
    local_run.prepare(job, rows, out)
    with Hosts(HOSTS, weather) as hosts, Cluster(out / "logs", local_run.THREADS) as cluster:
        yield Layout(hosts, cluster, job, rows, out)


def trained(out: Path) -> dict[str, Tensor]:
    """All that a run trained, at both servers and at the clients."""
    found: dict[str, Tensor] = {}
    for number, name in enumerate(SERVERS):
        tensors, _ = state_files.load(out / "server-state" / f"replica-{number}", ROUNDS)
        found |= {f"{name}/{key}": value for key, value in tensors.items() if not key.startswith("random/")}
    for name in CLIENTS:
        parts = load_file(out / "results" / name / "trained.safetensors")
        found |= {f"{name}/{key}": value for key, value in parts.items()}
    return found


@pytest.fixture
def calm(job: Job, rows: list[local_run.Site], tmp_path: Path) -> dict[str, Tensor]:
    with laid_out(job, rows, tmp_path / "calm", CALM) as layout:
        layout.until(layout.done)
    return trained(tmp_path / "calm")


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.slow
def test_delay_loss_and_short_cuts_end_no_session(
    job: Job, rows: list[local_run.Site], calm: dict[str, Tensor], tmp_path: Path
) -> None:
    with laid_out(job, rows, tmp_path / "storm", STORM) as layout:
        layout.until(lambda: layout.has_done("north", LOCAL_STEPS + 1))
        layout.cut("north", layout.passed(SHORT_CUT_S))
        layout.until(lambda: layout.has_done("coast", 2 * LOCAL_STEPS + 1))
        layout.cut(SERVERS[0], layout.passed(SHORT_CUT_S))
        layout.until(layout.done)
        assert [name for name in CLIENTS if layout.resumed(name)] == []
    assert_equal(trained(tmp_path / "storm"), calm)


@pytest.mark.slow
def test_delay_loss_and_long_cuts_undo_rounds_and_change_nothing(
    job: Job, rows: list[local_run.Site], calm: dict[str, Tensor], tmp_path: Path
) -> None:
    """Cables are out until the broker has given up who is behind them. The other replica's clients notice nothing."""
    with laid_out(job, rows, tmp_path / "storm", STORM) as layout:
        layout.until(lambda: layout.has_done("north", LOCAL_STEPS + 1))
        layout.cut("north", lambda: layout.has_logged(SERVERS[0], client="north", code="client_gone"))
        layout.until(lambda: layout.has_done("coast", 2 * LOCAL_STEPS + 1))
        layout.cut(SERVERS[0], lambda: layout.has_logged("broker", code="server_gone"))
        layout.until(layout.done)
        assert {name: layout.resumed(name) for name in CLIENTS} == {
            "north": [1, 2], "coast": [1, 2], "valley": [], "hill": [],
        }  # fmt: skip
    assert_equal(trained(tmp_path / "storm"), calm)
