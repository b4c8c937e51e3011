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
from shared.errors import AggregationError, CheckpointError, ConnectionFailed
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def calm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What three rounds end with that nobody disturbs."""
    folder = tmp_path_factory.mktemp("calm")
    return results(folder, train_in_process(job_of(model, count=3), sites(), folder))


@pytest.fixture(scope="module", autouse=True)
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
    assert any(bool(value.any()) for name, value in group.items() if ".lora_B." in name)
    shared = [outcomes[name].parts.shared for name in names]
    assert all(torch.equal(shared[0][key], other[key]) for other in shared for key in shared[0])
    if kind == "local privacy":  # its noise is another each time
        return
    clear_sites = sites(names, key=None)
    clear_job = job_of(model, key=None, **settings)
    clear = results(tmp_path / "clear", train_in_process(clear_job, clear_sites, tmp_path / "clear"))
    assert furthest(group, clear) < CLOSE


class Seen:
    """All that the server has of a run: what it was sent, what it sent, the words once it took off what it can."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.frames: list[bytes] = []
        self.words: list[tuple[int, np.ndarray[Any, Any]]] = []
        take, ask, send = RoundSum.take, RoundSum.ask, service.Service._send

        def came(sum_: RoundSum, client: str, message: Mask, frames: Any) -> None:
            kept = [bytes(frame) for frame in frames]
            self.frames += [bytes(frame) for frame in (*pack(message), *kept)]
            take(sum_, client, message, kept)

        def asked(sum_: RoundSum, client: str) -> Any:
            assert sum_.covered is not None
            self.words.append((len(sum_.covered.contributors), sum_.covered.words.copy()))
            return ask(sum_, client)

        def sent(self_: Any, session: Any, message: Any, frames: Any = ()) -> None:
            if not isinstance(message, Masking) or isinstance(message.body, GroupSum):
                self.frames += [bytes(frame) for frame in pack(message, list(frames))]
            send(self_, session, message, frames)

        monkeypatch.setattr(RoundSum, "take", came)
        monkeypatch.setattr(RoundSum, "ask", asked)
        monkeypatch.setattr(service.Service, "_send", sent)


def chi_square(data: bytes) -> float:
    """Over the 256 values of a byte: 255 on average for uniform ones, with a deviation of 22.6."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    return float(((counts - expected) ** 2 / expected).sum())


def holds(haystacks: list[bytes], values: Tensor) -> bool:
    """Whether four values in a row stand in any of these, as float32."""
    vector = values.detach().float().flatten().numpy()
    found = [at for at in range(len(vector) - 3) if (vector[at : at + 4] != 0).all()]
    assert found
    needle = vector[found[0] : found[0] + 4].tobytes()
    return any(needle in haystack for haystack in haystacks)


@pytest.mark.parametrize("clients", [3, 4])
def test_the_server_has_no_averages_and_no_sum(
    clients: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in messages nor on disk; the words are uniform above the bits that an even number of masks leaves 0."""
    names = ("a", "b", "c", "d")[:clients]
    seen = Seen(monkeypatch)
    outcomes = train_in_process(job_of(model, clients=clients), sites(names), tmp_path)
    state = tmp_path / "server-state"
    [*_, newest] = state_files.numbers(state)
    tensors, _ = state_files.load(state, newest)
    kept = {name for name in tensors if not name.startswith(("trunk/", "optimizer/"))}
    assert kept == {f"{SEALED}2", "random/torch"}
    disk = [path.read_bytes() for path in state.rglob("*") if path.is_file()]
    for name, parameter in outcomes["a"].parts.shared.items():
        assert bool(parameter.any()), name
        assert not holds([*disk, *seen.frames], parameter)
    trunk = trunk_tensors(tmp_path)
    assert all(holds(disk, value) for value in trunk.values())  # what it does have is found
    assert [count for count, _ in seen.words] == [clients, clients]
    for count, words in seen.words:
        bits = (count & -count).bit_length() - 1
        assert not (words & np.uint64(2**bits - 1)).any()
        shifted = (words >> np.uint64(bits)).view(np.uint8).reshape(-1, 8)
        assert chi_square(np.ascontiguousarray(shifted[:, :7]).tobytes()) < 255 + 6 * 22.6
    assert len({words.tobytes() for _, words in seen.words}) == 2
    assert not any(e["event"] == "update_refused" for outcome in outcomes.values() for e in outcome.events)


class Killed(Exception):
    """Stands for kill -9 of a client."""


@dataclass(frozen=True)
class Mortal(RemoteTrunk):
    """Dies when it would send this step of the sum of the second round, once."""

    at: type = Sealed
    dead: threading.Event = field(default_factory=threading.Event)

    def mask(self, round: int, body: Any, *arguments: Any, **named: Any) -> Any:
        if round == 1 and type(body) is self.at and not self.dead.is_set():
            self.dead.set()
            raise Killed
        return super().mask(round, body, *arguments, **named)


def mortal(at: type) -> Trunk:
    dead = threading.Event()
    return lambda link, job, parts, timeout_s: Mortal(link, job, timeout_s, at, dead)


def come_back(running: Serving, name: str, site: Site, folder: Path, outcomes: dict[str, Outcome]) -> None:
    """As `run_client` does: again and again after the connection broke."""
    while True:
        try:
            outcomes[name] = train_one(running, name, site, folder)
        except ConnectionFailed:
            continue
        return


@contextmanager
def coming_back(
    running: Serving, clients: Mapping[str, Site], folder: Path, outcomes: dict[str, Outcome]
) -> Iterator[None]:
    threads = [
        Background(name, partial(come_back, running, name, site, folder, outcomes)) for name, site in clients.items()
    ]
    yield
    for thread in threads:
        thread.join()
    running.service.join()


@pytest.mark.parametrize("at", [Unmask, Sealed], ids=["as it unmasks", "as it opens"])
def test_whoever_was_to_open_the_sum_is_killed_and_comes_back(
    at: type, model: Path, calm: dict[str, Tensor], tmp_path: Path
) -> None:
    """Killed as it opens: another one does, and the round stands. The end is the same, bit by bit."""
    job = job_of(model, count=3)
    outcomes: dict[str, Outcome] = {}
    clients = sites(a=mortal(at))
    others = {name: site for name, site in clients.items() if name != "a"}
    folder = tmp_path / "cut"
    with serving(job, folder, NAMES) as running, coming_back(running, others, folder, outcomes):
        with pytest.raises(Killed):
            train_one(running, "a", clients["a"], folder)
        come_back(running, "a", clients["a"], folder, outcomes)
    assert furthest(results(folder, outcomes), calm) == 0.0
    if at is Sealed:
        assert 1 in {e["round"] for e in outcomes["b"].events if e["event"] == "sum_opened"}
        assert not any(e["event"] == "resumed" for e in outcomes["b"].events)


def dies_in(method: str, owner: type, at: Callable[[Any], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server dies as it calls this, once `at` says so."""
    call = getattr(owner, method)

    def die(self: Any, *arguments: Any) -> Any:
        if at(self):
            raise CheckpointError("killed")
        return call(self, *arguments)

    monkeypatch.setattr(owner, method, die)


def until_it_dies(job: Job, folder: Path) -> None:
    contexts = []
    try:
        with serving(job, folder, NAMES) as running:
            contexts.append(running.context)
            threads = [Background(n, partial(train_one, running, n, site, folder)) for n, site in sites().items()]
            for thread in threads:
                with pytest.raises(ConnectionFailed):
                    thread.join()
    finally:
        contexts[0].destroy(0)


PLACES: dict[str, tuple[str, type, Callable[[Any], bool]]] = {
    "before anybody opens it": ("_ask_to_open", Rounds, lambda rounds: rounds.round == 1),
    "as the box comes": ("_seal", RoundSum, lambda sum_: sum_.round == 1),
    "before the box is on disk": ("complete_round", Progress, lambda progress: progress.round == 1),
    "after it is": ("_next_round", Rounds, lambda rounds: rounds.round == 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_server_killed_anywhere_ends_bit_equal(
    place: str, model: Path, calm: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(model, count=3)
    folder = tmp_path / "cut"
    with monkeypatch.context() as patched:
        dies_in(*PLACES[place], patched)
        with pytest.raises(CheckpointError, match="killed"):
            until_it_dies(job, folder)
    assert (folder / "server-state" / BOUND).exists()
    assert state_files.numbers(folder / "server-state")[-1] == (2 if place == "after it is" else 1)
    assert furthest(results(folder, train_in_process(job, sites(), folder)), calm) == 0.0


def test_masks_of_another_key_spoil_the_sum_which_is_said_and_rounds_go_on(model: Path, tmp_path: Path) -> None:
    """A client that lies about its key: an honest one is refused before (tests/shared/test_group_keys.py). Nobody can
    open the sums that it is in; all go on from where they began, as after an overflow.
    """
    job = job_of(model, clients=4, count=3, cohort={"quorum": 3})
    names = (*NAMES, "d")
    clients = sites(names)
    clients["d"] = replace(clients["d"], group_key=OTHER)
    outcomes: dict[str, Outcome] = {}

    with (
        serving(job, tmp_path, names) as running,
        coming_back(running, {name: clients[name] for name in NAMES}, tmp_path, outcomes),
    ):
        train_one(running, "d", clients["d"], tmp_path)
        served = running.running.service
        assert served is not None
    assert served.counters["sums_failed"] == 3
    unopened = [e for o in outcomes.values() for e in o.events if e["event"] == "sum_unopened"]
    assert {e["round"] for e in unopened} == {0, 1, 2}
    assert all("masks did not cancel" in e["reason"] for e in unopened)
    # No sum was ever had: what clients hand in is as it was at first.
    parts = [outcomes[name].parts.shared for name in NAMES]
    assert all(torch.equal(parts[0][key], other[key]) for other in parts for key in parts[0])
    assert all(not bool(value.any()) for key, value in parts[0].items() if ".lora_B." in key)


@dataclass(frozen=True)
class Says(RemoteTrunk):
    """Sends `frame` for its box, or that the sum does not open."""

    twist: Callable[[Any, Any], tuple[Any, Any]] = lambda body, frames: (body, frames)

    def mask(self, round: int, body: Any, due: Any, frames: Any = (), *, weight: int = 0) -> Any:
        if isinstance(body, Sealed) and round == 1:
            body, frames = self.twist(body, frames)
        return super().mask(round, body, due, frames, weight=weight)


def says(twist: Callable[[Any, Any], tuple[Any, Any]]) -> Trunk:
    return lambda link, job, parts, timeout_s: Says(link, job, timeout_s, twist)


def test_one_that_says_it_does_not_open_is_passed_over(model: Path, calm: dict[str, Tensor], tmp_path: Path) -> None:
    job = job_of(model, count=3)
    clients = sites(a=says(lambda body, frames: (Unopened(), [])))
    outcomes = train_in_process(job, clients, tmp_path / "cut")
    assert furthest(results(tmp_path / "cut", outcomes), calm) == 0.0
    assert [e["round"] for e in outcomes["b"].events if e["event"] == "sum_opened"] == [1]


def test_averages_sealed_under_another_key_are_a_typed_error_for_all(model: Path, tmp_path: Path) -> None:
    """The one that opens could put anything into the box: what does not open ends the job, in one clear line."""
    clients = sites(a=says(lambda body, frames: (body, [bytes(len(frames[0]))])))
    with serving(job_of(model, count=3), tmp_path, NAMES, farewell_s=1.0) as running:
        threads = [Background(n, partial(train_one, running, n, site, tmp_path)) for n, site in clients.items()]
        for thread in threads:
            with pytest.raises(AggregationError, match="with which round 2 begins do not open under"):
                thread.join()
