"""Masked updates in whole runs: the same model as without masks, words that say nothing, and clients that are lost."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from shared.errors import CheckpointError, ConnectionFailed, Refused
from shared.job import Job, Lora, parse_job
from shared.payload.messages import Mask
from shared.secure_aggregation.messages import AdvertiseKeys, MaskedInput, ShareKeys, Unmask
from worker_client.head_tail import HeadTail
from worker_client.link import Link
from worker_client.local_trunk import trunk_of
from worker_client.remote_trunk import RemoteTrunk
from worker_server.masking import RoundSum
from worker_server.progress import BOUND, Progress
from worker_server.rounds import Rounds

NAMES = ("a", "b", "c")
PHASES = (AdvertiseKeys, ShareKeys, MaskedInput, Unmask)
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": None, "learning_rate": 0.05}
# What fixed point costs in two rounds, on values of 0.1 and less.
CLOSE = 1e-6


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "model")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def job_of(model: Path, clients: int = 3, count: int = 2, **sections: Any) -> Job:
    job = make_job(model, Case(("head", "trunk", "tail"), clients, method=Lora(r=2)))
    values = job.model_dump(mode="json")
    values["rounds"] |= {"count": count, "local_steps": 2}
    for section, change in sections.items():
        values[section] |= change
    return parse_job(values, "job")


def sites(names: tuple[str, ...] = NAMES, **trunks: Any) -> dict[str, Site]:
    return {
        name: Site(random_rows(8, seed), random_rows(2, 9), trunks.get(name, trunk_of))
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
    "per-client adapters": {"cohort": {"adapters": "per_client"}},
    "by rows": {"rounds": {"weighting": "rows"}, "cohort": {"adapters": "per_client"}},
    "plain fedavg": {"split": {"trunk": "client"}},
    "fedadam": {"aggregation": {"type": "fedadam", "tau": 0.1}},
    "fedavgm": {"aggregation": {"type": "fedavgm"}},
    "scaffold": {"aggregation": {"type": "scaffold"}, "training": SGD},
    "secagg+": {"aggregation": {"secure": "secagg+"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_masked_it_ends_as_unmasked(kind: str, model: Path, tmp_path: Path) -> None:
    """To the error of fixed point; and something was trained."""
    settings = KINDS[kind]
    job = job_of(model, **settings)
    assert job.secure == settings.get("aggregation", {}).get("secure", "secagg")
    plain = job_of(model, **settings | {"aggregation": {**settings.get("aggregation", {}), "secure": "off"}})
    assert plain.secure == "off"
    masked = results(tmp_path / "masked", train_in_process(job, sites(), tmp_path / "masked"))
    clear = results(tmp_path / "clear", train_in_process(plain, sites(), tmp_path / "clear"))
    first = results(tmp_path / "one", train_in_process(job_of(model, count=1, **settings), sites(), tmp_path / "one"))
    assert furthest(masked, clear) < CLOSE
    assert furthest(masked, first) > 100 * CLOSE


def test_greedy_masks_too_and_all_end_with_the_same(model: Path, tmp_path: Path) -> None:
    outcomes = train_in_process(job_of(model, cohort={"mode": "greedy"}), sites(), tmp_path)
    a, b, c = (outcomes[name].parts.parameters for name in NAMES)
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in a)
    assert not any(e["event"] == "update_refused" for outcome in outcomes.values() for e in outcome.events)


class Words:
    """What arrives at the server in place of updates, by client and round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.came: dict[tuple[str, int], bytes] = {}
        self.kinds: Counter[str] = Counter()
        take = RoundSum.take

        def seen(sum_: RoundSum, client: str, message: Mask, frames: Any) -> None:
            frames = list(frames)
            self.kinds[message.body.type] += 1
            for frame in frames:
                self.came[client, message.round] = bytes(frame)
            take(sum_, client, message, frames)

        def refuse(*_: Any) -> None:
            raise AssertionError("an update came in the clear")

        monkeypatch.setattr(RoundSum, "take", seen)
        monkeypatch.setattr(Rounds, "update", refuse)


def chi_square(data: bytes) -> float:
    """Over the 256 values of a byte: 255 on average for uniform ones, with a deviation of 22.6."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_server_gets_nothing_but_uniform_words_that_are_others_each_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for folder in ("one", "two"):
        with monkeypatch.context() as patched:
            words = Words(patched)
            outcomes = train_in_process(job_of(model), sites(), tmp_path / folder)
        assert words.kinds == dict.fromkeys(("advertise_keys", "share_keys", "masked_input", "unmask"), 6)
        runs.append((words.came, results(tmp_path / folder, outcomes)))
    (first, trained), (second, again) = runs
    assert furthest(trained, again) == 0.0  # the very same updates
    assert first.keys() == second.keys() == {(name, round) for name in NAMES for round in range(2)}
    for key, data in first.items():
        assert chi_square(data) < 255 + 6 * 22.6
        assert chi_square(bytes(x ^ y for x, y in zip(data, second[key], strict=True))) < 255 + 6 * 22.6
    # Not by itself: an update in fixed point is far from uniform.
    assert chi_square(np.linspace(-0.1, 0.1, 2000).astype("<f8").tobytes()) > 1000


class Killed(Exception):
    """Stands for kill -9 of a client."""


@dataclass(frozen=True)
class Mortal(RemoteTrunk):
    """Dies when it would send this step of the sum of the second round, once."""

    at: type = Unmask
    dead: threading.Event = field(default_factory=threading.Event)

    def mask(self, round: int, body: Any, *arguments: Any, **named: Any) -> Any:
        if round == 1 and type(body) is self.at and not self.dead.is_set():
            self.dead.set()
            raise Killed
        return super().mask(round, body, *arguments, **named)


def mortal(at: type) -> Callable[[Link, Job, HeadTail, float], RemoteTrunk]:
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


@pytest.mark.parametrize("at", PHASES, ids=lambda kind: kind.__name__)
def test_a_client_killed_in_any_phase_that_comes_back_changes_nothing(at: type, model: Path, tmp_path: Path) -> None:
    job = job_of(model, count=3)
    calm = results(tmp_path / "calm", train_in_process(job, sites(), tmp_path / "calm"))
    outcomes: dict[str, Outcome] = {}
    clients = sites(c=mortal(at))
    others = {name: site for name, site in clients.items() if name != "c"}
    folder = tmp_path / "cut"
    with serving(job, folder, NAMES) as running, coming_back(running, others, folder, outcomes):
        with pytest.raises(Killed):
            train_one(running, "c", clients["c"], folder)
        come_back(running, "c", clients["c"], folder, outcomes)
    assert furthest(results(folder, outcomes), calm) == 0.0


@pytest.mark.parametrize("at", PHASES, ids=lambda kind: kind.__name__)
def test_with_a_smaller_quorum_the_others_go_on_without_the_killed(at: type, model: Path, tmp_path: Path) -> None:
    names = (*NAMES, "d")
    job = job_of(model, clients=4, count=3, cohort={"quorum": 3})
    clients = sites(names, d=mortal(at))
    outcomes: dict[str, Outcome] = {}
    with (
        serving(job, tmp_path, names, farewell_s=1.0) as running,
        coming_back(running, {name: clients[name] for name in NAMES}, tmp_path, outcomes),
        pytest.raises(Killed),
    ):
        train_one(running, "d", clients["d"], tmp_path)
    for outcome in outcomes.values():
        events = [event["event"] for event in outcome.events]
        assert [e["members"] for e in outcome.events if e["event"] == "round"] == [4, 4, 3]
        assert "resumed" not in events
        assert "update_refused" not in events


def test_a_server_killed_after_it_saw_the_sum_ends_bit_equal(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it wrote it down: the round is done again among the same."""
    job = job_of(model, count=3)
    calm = results(tmp_path / "calm", train_in_process(job, sites(), tmp_path / "calm"))
    folder = tmp_path / "cut"
    killed(job, folder, sites(), monkeypatch)
    assert (folder / "server-state" / BOUND).exists()
    assert furthest(results(folder, train_in_process(job, sites(), folder)), calm) == 0.0


def killed(job: Job, folder: Path, clients: Mapping[str, Site], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server dies in the second round, with the sum in its hands."""
    complete = Progress.complete_round

    def die(progress: Progress, *arguments: Any) -> None:
        if progress.round == 1:
            raise CheckpointError("killed")
        complete(progress, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "complete_round", die)
        with pytest.raises(CheckpointError, match="killed"):
            until_it_dies(job, folder, clients)


def until_it_dies(job: Job, folder: Path, clients: Mapping[str, Site]) -> None:
    contexts = []
    try:
        with serving(job, folder, sorted(clients)) as running:
            contexts.append(running.context)
            threads = [Background(n, partial(train_one, running, n, site, folder)) for n, site in clients.items()]
            for thread in threads:
                with pytest.raises(ConnectionFailed):
                    thread.join()
    finally:
        contexts[0].destroy(0)


def test_clients_do_not_help_with_two_sums_of_one_round(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that forgot whose sum it was asks for another: every client says no, and why."""
    names = (*NAMES, "d")
    job = job_of(model, clients=4, cohort={"quorum": 3})
    killed(job, tmp_path, sites(names), monkeypatch)
    (tmp_path / "server-state" / BOUND).unlink()
    clients = sites(names, d=mortal(AdvertiseKeys))
    with serving(job, tmp_path, names) as running:
        threads = {n: Background(n, partial(train_one, running, n, clients[n], tmp_path)) for n in names}
        with pytest.raises(Killed):
            threads["d"].join()
        for name in NAMES:
            with pytest.raises(Refused, match="round 1: this client helped to unmask a sum of this round that d was"):
                threads[name].join()


@dataclass(frozen=True)
class Liar(RemoteTrunk):
    """Sends what `twist` makes of its steps."""

    twist: Callable[[Any, Any], tuple[Any, Any]] = lambda body, frames: (body, frames)

    def mask(self, round: int, body: Any, due: Any, frames: Any = (), *, weight: int = 0) -> Any:
        body, frames = self.twist(body, frames)
        return super().mask(round, body, due, frames, weight=weight)


def short(body: Any, frames: Any) -> tuple[Any, Any]:
    return body, [frame[:-8] for frame in frames]


def out_of_turn(body: Any, frames: Any) -> tuple[Any, Any]:
    if isinstance(body, ShareKeys):
        return Unmask(self_shares=(), key_shares=()), ()
    return body, frames


@pytest.mark.parametrize(("twist", "code"), [(short, "tensor"), (out_of_turn, "phase")])
def test_a_client_that_breaks_the_rules_is_refused_and_the_others_go_on(
    twist: Any, code: str, model: Path, tmp_path: Path
) -> None:
    names = (*NAMES, "d")
    job = job_of(model, clients=4, cohort={"quorum": 3})
    clients = sites(names, d=lambda link, job, parts, timeout_s: Liar(link, job, timeout_s, twist))
    outcomes: dict[str, Outcome] = {}
    with (
        serving(job, tmp_path, names, farewell_s=1.0) as running,
        coming_back(running, {name: clients[name] for name in NAMES}, tmp_path, outcomes),
    ):
        with pytest.raises(Refused) as caught:
            train_one(running, "d", clients["d"], tmp_path)
        assert caught.value.reason == code
        service = running.running.service
        assert service is not None
        assert service.counters[f"refused_{code}"] == 1
    assert [e["members"] for e in outcomes["a"].events if e["event"] == "round"] == [4, 3]


def wrong_shares(body: Any, frames: Any) -> tuple[Any, Any]:
    if isinstance(body, Unmask):
        of_self = tuple(share.model_copy(update={"share": bytes(33)}) for share in body.self_shares)
        return body.model_copy(update={"self_shares": of_self}), frames
    return body, frames


def test_a_client_that_gives_wrong_shares_spoils_no_sum_and_is_counted(model: Path, tmp_path: Path) -> None:
    names = (*NAMES, "d")
    job = job_of(model, clients=4, cohort={"quorum": 3})
    honest = train_in_process(job, sites(names), tmp_path / "honest")
    liars = sites(names, d=lambda link, job, parts, timeout_s: Liar(link, job, timeout_s, wrong_shares))
    outcomes: dict[str, Outcome] = {}
    with serving(job, tmp_path / "lied to", names) as running:
        with coming_back(running, liars, tmp_path / "lied to", outcomes):
            pass
        assert running.running.registry.get_sample_value("flglm_server_wrong_shares_total") == job.rounds.count
    assert furthest(results(tmp_path / "honest", honest), results(tmp_path / "lied to", outcomes)) == 0.0


def test_an_update_that_is_not_finite_stays_at_its_client(model: Path, tmp_path: Path) -> None:
    """It hands in that nothing changed, with the least weight; the others are averaged, and all end the same."""

    def spoil(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 1:
            with torch.no_grad():
                next(iter(parts["c"].parameters.values())).fill_(float("nan"))

    job = job_of(model)
    parts: dict[str, HeadTail] = {}

    def trunk(link: Link, job: Job, mine: HeadTail, timeout_s: float) -> RemoteTrunk:
        parts["c"] = mine
        return trunk_of(link, job, mine, timeout_s)

    outcomes: dict[str, Outcome] = {}
    clients = sites(c=trunk)
    with serving(job, tmp_path, NAMES) as running:

        def run(name: str) -> None:
            outcomes[name] = train_one(running, name, clients[name], tmp_path, spoil if name == "c" else None)

        for client in [Background(name, partial(run, name)) for name in NAMES]:
            client.join()
        running.service.join()
    [refused] = [event for event in outcomes["c"].events if event["event"] == "update_refused"]
    assert refused["round"] == 0
    assert "stayed here" in refused["reason"]
    values = results(tmp_path, outcomes)
    assert all(bool(value.isfinite().all()) for value in values.values())
    assert all(torch.equal(values[f"a/{name}"], values[f"c/{name}"]) for name in outcomes["a"].parts.parameters)


def test_two_clients_have_nothing_to_hide_in_and_it_is_said(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        train_in_process(job_of(model, clients=2, count=1), sites(NAMES[:2]), tmp_path)
    [record] = [record for record in caplog.records if record.getMessage() == "updates_not_masked"]
    assert "fewer than 3 hides nothing" in str(vars(record))
