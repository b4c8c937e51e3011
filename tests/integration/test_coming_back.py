"""Clients and servers come back by themselves: after a lost member, a dead broker, a broker that starts anew.

And from links that are there and carry nothing, whatever the clock on the wall says meanwhile.
"""

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.fidelity import ALL, Case, make_job, write_random_rows
from benchmarks.slow_link import SlowLink
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from broker.service import Broker
from broker.settings import BrokerSettings
from launcher.in_process import Background, trunk_tensors
from shared.errors import ConnectionFailed
from shared.identity import generate_identity
from shared.invitations import BrokerAt, Invitation
from shared.job import Job
from shared.wire.curve import Door
from worker_client.client import ClientSettings, run_client
from worker_client.steps import Report
from worker_server.server import Server
from worker_server.settings import ServerSettings

ANYWHERE = "tcp://127.0.0.1:*"
NAMES = ("a", "b")
LET_GO_S = 10.0
YEAR_S = 365 * 24 * 3600.0
TIME_OF_DAY = re.compile(
    r"time\.time\b|time\.time_ns|from time import|(?<!def )\b(now|utcnow|today)\((UTC)?\)|CLOCK_REALTIME"
)


class Killed(Exception):
    """Stands for kill -9 of a client: it says nothing more."""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    folder = save_tiny_model("llama", tmp_path / "model")
    save_word_tokenizer(folder)
    made = make_job(folder, Case(ALL, 2))
    return made.model_copy(update={"rounds": made.rounds.model_copy(update={"count": 3, "local_steps": 4})})


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    return {name: write_random_rows(tmp_path / f"{name}.jsonl", 8, seed) for seed, name in enumerate(NAMES)}


class House:
    """Brokers that can be stopped and started at their addresses, a server, and clients."""

    def __init__(self, job: Job, data: dict[str, Path], folder: Path, brokers: int) -> None:
        self.job, self.data, self.folder = job, data, folder
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.people = {name: generate_identity(name) for name in (*NAMES, "server")}
        self.settings = [BrokerSettings(frontend=ANYWHERE, backend=ANYWHERE, heartbeat_s=0.1, timeout_s=1.0)] * brokers
        self.brokers: dict[int, tuple[Broker, Background]] = {}
        self.detours: dict[str, str] = {}
        for number in range(brokers):
            self.start_broker(number)
        admitted = {self.people[name].public: name for name in NAMES}
        self.server = Server(
            ServerSettings(
                brokers=tuple(Door(settings.backend) for settings in self.settings),
                state=folder / "server-state",
                broker_timeout_s=20.0,
                farewell_s=2.0,
            ),
            job,
            self.people["server"],
            lambda: admitted,
            self.context,
        )
        self.service = Background("server", self.server.run)

    def start_broker(self, number: int) -> None:
        deadline = time.monotonic() + LET_GO_S
        while True:  # libzmq lets go of an address a little after its socket was closed
            broker = Broker(self.settings[number], self.context)
            try:
                broker.__enter__()
                break
            except ConnectionFailed:
                if time.monotonic() > deadline:
                    raise
        addresses = {"frontend": broker.frontend, "backend": broker.backend}
        self.settings[number] = self.settings[number].model_copy(update=addresses)
        self.brokers[number] = broker, Background("broker", broker.run)

    def stop_broker(self, number: int) -> None:
        broker, thread = self.brokers.pop(number)
        broker.router.peers.clear()  # as if killed: nobody is told
        broker.stop()
        thread.join()
        broker.__exit__(None, None, None)

    def run(self, name: str, report: Report = lambda event: None, reconnect_s: float = 20.0) -> None:
        """A client's run to the end of the job."""
        doors = [BrokerAt(address=self.detours.get(name, settings.frontend)) for settings in self.settings]
        invitation = Invitation(
            id="0" * 32,
            client=name,
            brokers=doors if name == "a" else doors[::-1],
            server="server",
            server_public_key=self.people["server"].public.hex(),
            job=self.job.digest().hex(),
            expires_at=datetime.now(UTC) + timedelta(days=1),
        )
        settings = ClientSettings(
            self.data[name],
            self.folder / name,
            validation_fraction=0,
            connect_timeout_s=min(8.0, 5 * reconnect_s),
            reconnect_s=reconnect_s,
        )
        run_client(settings, invitation, self.people[name], report, self.context)

    def close(self) -> None:
        self.server.stop()
        self.service.join()
        for number in list(self.brokers):
            self.stop_broker(number)
        self.context.destroy(0)


@contextmanager
def living(job: Job, data: dict[str, Path], folder: Path, brokers: int = 1) -> Iterator[House]:
    house = House(job, data, folder, brokers)
    try:
        yield house
    finally:
        house.close()


def results(folder: Path) -> dict[str, Tensor]:
    trained = {f"trunk/{name}": value for name, value in trunk_tensors(folder).items()}
    for name in NAMES:
        trained |= {f"{name}/{key}": value for key, value in load_file(folder / name / "trained.safetensors").items()}
    return trained


def train(house: House, reports: dict[str, Report]) -> None:
    clients = [Background(name, lambda n=name: house.run(n, reports.get(n, lambda event: None))) for name in NAMES]
    for client in clients:
        client.join()
    house.service.join()


def once(step: int, action: Callable[[], None]) -> Report:
    done = threading.Event()

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step and not done.is_set():
            done.set()
            action()

    return report


def undisturbed(job: Job, data: dict[str, Path], folder: Path) -> dict[str, Tensor]:
    with living(job, data, folder) as house:
        train(house, {})
    return results(folder)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_killed_client_that_comes_back_changes_nothing(job: Job, data: dict[str, Path], tmp_path: Path) -> None:
    """The other is sent back to the beginning of the round, and comes back by itself."""
    calm = undisturbed(job, data, tmp_path / "calm")

    def die() -> None:
        raise Killed

    seen: list[dict[str, Any]] = []
    with living(job, data, tmp_path / "cut") as house:
        stays = Background("a", lambda: house.run("a", seen.append))
        with pytest.raises(Killed):
            house.run("b", once(6, die))
        house.run("b")
        stays.join()
        house.service.join()
    assert [event["rounds"] for event in seen if event["event"] == "resumed"] == [1]
    assert_equal(results(tmp_path / "cut"), calm)


@pytest.mark.parametrize("back", [True, False], ids=["it comes back", "another is there"])
def test_a_killed_broker_changes_nothing(back: bool, job: Job, data: dict[str, Path], tmp_path: Path) -> None:
    calm = undisturbed(job, data, tmp_path / "calm")
    with living(job, data, tmp_path / "cut", brokers=1 if back else 2) as house:

        def kill() -> None:
            house.stop_broker(0)
            if back:
                house.start_broker(0)

        train(house, {"a": once(5, kill)})
    assert_equal(results(tmp_path / "cut"), calm)


def test_who_does_not_get_back_gives_up_in_time(job: Job, data: dict[str, Path], tmp_path: Path) -> None:
    alone = job.model_copy(update={"cohort": job.cohort.model_copy(update={"clients": 1})})
    with (
        living(alone, data, tmp_path / "cut") as house,
        pytest.raises(ConnectionFailed, match=r"no broker answers at tcp://127\.0\.0\.1"),
    ):
        house.run("a", once(2, lambda: house.stop_broker(0)), reconnect_s=1.0)


def test_a_connection_that_vanishes_without_a_word_changes_nothing(
    job: Job, data: dict[str, Path], tmp_path: Path
) -> None:
    """Both its ends stay open, and hear nothing: the broker and the client each notice by the silence."""
    calm = undisturbed(job, data, tmp_path / "calm")
    seen: list[dict[str, Any]] = []
    with living(job, data, tmp_path / "cut") as house, SlowLink(house.settings[0].frontend) as link:
        house.detours["b"] = link.address
        vanish = once(6, link.vanish)

        def report(event: dict[str, Any]) -> None:
            seen.append(event)
            vanish(event)

        train(house, {"b": report})
        assert house.brokers[0][0].router.counters["refused_timed_out"] == 1
    assert [event["rounds"] for event in seen if event["event"] == "resumed"] == [1]
    assert_equal(results(tmp_path / "cut"), calm)


def test_where_fewer_suffice_the_others_go_on_without_whoever_vanished(
    job: Job, data: dict[str, Path], tmp_path: Path
) -> None:
    few = job.model_copy(update={"cohort": job.cohort.model_copy(update={"quorum": 1})})
    seen: list[dict[str, Any]] = []
    with living(few, data, tmp_path) as house, SlowLink(house.settings[0].frontend) as link:
        house.detours["b"] = link.address
        stays = Background("a", lambda: house.run("a", seen.append))

        def vanish() -> None:
            link.vanish()
            stays.join()

        with pytest.raises(ConnectionFailed):
            house.run("b", once(6, vanish), reconnect_s=0.2)
        house.service.join()
    assert [event["members"] for event in seen if event["event"] == "round"] == [2, 2, 1]
    assert (tmp_path / "a" / "flglm.json").exists()


def test_and_so_they_do_with_a_server_that_was_started_again(job: Job, data: dict[str, Path], tmp_path: Path) -> None:
    """It waits for whoever was there, `cohort.deadline_s` long."""
    few = job.model_copy(update={"cohort": job.cohort.model_copy(update={"quorum": 1, "deadline_s": 3.0})})

    def die() -> None:
        raise Killed

    seen: list[dict[str, Any]] = []
    with living(few, data, tmp_path) as house:
        clients = [Background(name, lambda n=name: house.run(n, once(6, die))) for name in NAMES]
        for client in clients:
            with pytest.raises(Killed):
                client.join()
    with living(few, data, tmp_path) as house:
        house.run("a", seen.append)
        house.service.join()
    assert [(event["round"], event["members"]) for event in seen if event["event"] == "round"] == [(1, 1), (2, 1)]
    assert (tmp_path / "a" / "flglm.json").exists()


def test_a_clock_that_jumps_changes_nothing(
    job: Job, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a year, forward and back again, whenever somebody looks at it: no session ends, and nobody comes back."""
    calm = undisturbed(job, data, tmp_path / "calm")
    jumps, right = itertools.cycle((YEAR_S, 0, -YEAR_S)), time.time
    monkeypatch.setattr(time, "time", lambda: right() + next(jumps))
    seen: list[dict[str, Any]] = []
    with living(job, data, tmp_path / "jumping") as house:
        train(house, {"a": seen.append})
    assert [event for event in seen if event["event"] == "resumed"] == []
    assert_equal(results(tmp_path / "jumping"), calm)


def test_no_role_asks_for_the_time_of_day() -> None:
    """Invitations are held against the date by the command, once; all waiting is by the monotonic clock."""
    root = Path(__file__).parents[2]
    roles = ("broker", "worker_server", "worker_client", "shared")
    asking = [path for role in roles for path in (root / role).rglob("*.py") if TIME_OF_DAY.search(path.read_text())]
    assert asking == []
