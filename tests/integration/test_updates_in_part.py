"""Sparse and quantised updates and averages in whole runs: the books balance, kills leave no trace, latecomers get all,
and what is not as it should be is refused without ending anybody's round."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.fidelity import Case, make_job, random_rows, write_random_rows
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from launcher import local_run
from launcher.in_process import Background, Outcome, Site, serving, train_in_process, train_one, trunk_tensors
from shared import state_files
from shared.error_feedback import Compressed
from shared.errors import CheckpointError, ConnectionFailed
from shared.job import Full, Job, Lora, Method, parse_job
from shared.model.checkpoint import checkpoint_of
from shared.payload import positions
from shared.payload.pieces import Piece
from worker_client.head_tail import HeadTail, load_client_parts
from worker_client.link import Link
from worker_client.local_trunk import trunk_of
from worker_client.remote_trunk import Boundary, RemoteTrunk
from worker_client.training import told

NAMES = ("a", "b")
LORA = Lora(r=2)
BOTH_WAYS: dict[str, dict[str, Any]] = {
    "sparse": {"update_density": 0.1, "average_density": 0.2},
    "quantised": {"update": "int8", "average": "int4"},
    "sparse, quantised": {
        "update": "int4",
        "update_density": 0.25,
        "average": "int8",
        "average_density": 0.25,
    },
    "up": {"update": "bfloat16", "update_density": 0.1},
    "down": {"average_density": 0.05},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "model")


def job_of(
    model: Path,
    wire: dict[str, Any],
    rounds: int = 3,
    method: Method = LORA,
    aggregation: dict[str, Any] | None = None,
    split: dict[str, Any] | None = None,
    cohort: dict[str, Any] | None = None,
) -> Job:
    job = make_job(model, Case(("head", "trunk", "tail"), len(NAMES), method=method))
    values = job.model_dump(mode="json")
    values["rounds"] |= {"count": rounds, "local_steps": 2, "weighting": "rows"}
    values["wire"] |= wire
    values["cohort"] |= cohort or {}
    values["split"] |= split or {}
    return parse_job(values | {"aggregation": aggregation or {"type": "fedavg"}}, "job")


def sites(trunk: Callable[[Link, Job, HeadTail, float], RemoteTrunk] = trunk_of) -> dict[str, Site]:
    return {name: Site(random_rows(8, seed), random_rows(3, 10 + seed), trunk) for seed, name in enumerate(NAMES)}


def results(folder: Path, outcomes: dict[str, Outcome]) -> dict[str, Tensor]:
    trained = {f"trunk/{name}": value for name, value in trunk_tensors(folder).items()}
    for name, outcome in outcomes.items():
        trained |= {f"{name}/{key}": p.detach().clone() for key, p in outcome.parts.parameters.items()}
    return trained


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def of(folder: Path, number: int, prefix: str) -> dict[str, Tensor]:
    tensors, _ = state_files.load(folder, number)
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def beginning(job: Job) -> dict[str, Tensor]:
    """What every client begins with."""
    parts = load_client_parts(checkpoint_of(job), job)
    return {name: parameter.detach().clone() for name, parameter in parts.parameters.items()}


@dataclass(frozen=True)
class Watched(RemoteTrunk):
    """Notes what is handed in, and what the boundaries bring."""

    sent: list[Compressed] = field(default_factory=list)
    boundaries: list[Boundary] = field(default_factory=list)

    def join(self, rows: int) -> Boundary:
        return self._noted(super().join(rows))

    def update_in_part(self, round: int, weight: int, difference: Compressed) -> Boundary:
        self.sent.append(difference)
        return self._noted(super().update_in_part(round, weight, difference))

    def update(self, round: int, weight: int, values: Mapping[str, Tensor]) -> Boundary:
        return self._noted(super().update(round, weight, values))

    def _noted(self, boundary: Boundary) -> Boundary:
        self.boundaries.append(boundary)
        return boundary


@dataclass
class Watch:
    """Makes watched trunks, and keeps them, by client."""

    trunks: dict[str, Watched] = field(default_factory=dict)

    def sites(self) -> dict[str, Site]:
        return {name: Site(site.train, site.validation, partial(self._make, name)) for name, site in sites().items()}

    def _make(self, name: str, link: Link, job: Job, parts: HeadTail, timeout_s: float) -> RemoteTrunk:
        self.trunks[name] = Watched(link, job, timeout_s)
        return self.trunks[name]


@pytest.mark.parametrize("wire", BOTH_WAYS)
def test_the_books_balance(wire: str, model: Path, tmp_path: Path) -> None:
    """With clients of equal weight: what all hold at the end, and what server and clients still keep, is the start and
    the mean of what the clients changed in every round, the trunk's part aside."""
    job = job_of(model, BOTH_WAYS[wire])
    watch = Watch()
    outcomes = train_in_process(job, watch.sites(), tmp_path)
    held = {name: outcome.parts.parameters for name, outcome in outcomes.items()}
    server = tmp_path / "server-state"
    start, told = beginning(job), of(server, 3, "average/")
    assert all(torch.equal(held["a"][name], held["b"][name]) for name in start)
    assert all(torch.equal(held["a"][name], told[name]) for name in start)
    assert any(not torch.equal(told[name], start[name]) for name in start)
    if not job.wire.compresses_updates:
        return
    untold = of(server, 3, "unsent/") or {name: torch.zeros_like(value) for name, value in start.items()}
    moved = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in start.items()}
    for trunk in watch.trunks.values():
        assert len(trunk.sent) == 3
        for compressed in trunk.sent:
            for name in moved:
                moved[name] += compressed.sent[name].double() / len(NAMES)
    for name, value in start.items():
        wanted, made = value.double() + moved[name], told[name].double() + untold[name].double()
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-6)


def test_what_a_client_sent_and_keeps_is_what_it_changed(model: Path, tmp_path: Path) -> None:
    """Over all rounds, from its checkpoints: values after the local steps less what the round began with."""
    job = job_of(model, BOTH_WAYS["sparse, quantised"])
    watch = Watch()
    train_in_process(job, watch.sites(), tmp_path)
    trunk = watch.trunks["a"]
    begun = beginning(job)
    account = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in begun.items()}
    for round in range(3):
        if round:
            begun = told(job.wire, begun, trunk.boundaries[round])
        trained = of(tmp_path / "a", round + 1, "trained/")
        for name in account:
            account[name] += trained[name].double() - begun[name].double()
            account[name] -= trunk.sent[round].sent[name].double()
    kept = of(tmp_path / "a", 3, "after/unsent/")
    assert any(bool(value.any()) for value in kept.values())
    for name, value in account.items():
        torch.testing.assert_close(kept[name].double(), value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wire", ["sparse", "sparse, quantised", "down"])
def test_killed_and_resumed_it_ends_bit_equal(wire: str, model: Path, tmp_path: Path) -> None:
    job = job_of(model, BOTH_WAYS[wire], aggregation={"type": "fedadam"})
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
    watch = Watch()
    again = results(folder, train_in_process(job, watch.sites(), folder))
    assert different(whole, again) == []
    assert different(of(tmp_path / "whole" / "a", 3, "unsent/"), of(folder / "a", 3, "unsent/")) == []
    # Who comes back is told everything, and what follows is a difference again.
    first, *later = watch.trunks["a"].boundaries
    assert first.averages
    assert not first.pieces
    assert later
    assert all(boundary.pieces and not boundary.averages for boundary in later)


def test_an_undone_round_sends_the_same_bytes_again(model: Path, tmp_path: Path) -> None:
    """b vanishes in the last round after a has handed in: a goes back, and hands in the same."""
    job = job_of(model, BOTH_WAYS["sparse, quantised"])
    sent: list[tuple[int, tuple[bytes, ...]]] = []

    @dataclass(frozen=True)
    class Noted(RemoteTrunk):
        def update_in_part(self, round: int, weight: int, difference: Compressed) -> Boundary:
            sent.append((round, difference.frames))
            return super().update_in_part(round, weight, difference)

    class Vanished(Exception):
        """Stands for kill -9."""

    @dataclass(frozen=True)
    class Vanishing(RemoteTrunk):
        def update_in_part(self, round: int, weight: int, difference: Compressed) -> Boundary:
            if round == 2:
                raise Vanished
            return super().update_in_part(round, weight, difference)

    def noted(link: Link, job: Job, parts: HeadTail, timeout_s: float) -> RemoteTrunk:
        return Noted(link, job, timeout_s)

    def vanishing(link: Link, job: Job, parts: HeadTail, timeout_s: float) -> RemoteTrunk:
        return Vanishing(link, job, timeout_s)

    mine, other = sites(noted)["a"], sites(vanishing)["b"]
    with serving(job, tmp_path, NAMES) as running:
        first = [
            Background("a", partial(train_one, running, "a", mine, tmp_path)),
            Background("b", partial(train_one, running, "b", other, tmp_path)),
        ]
        for client, error in zip(first, (ConnectionFailed, Vanished), strict=True):
            with pytest.raises(error):
                client.join()
        second = [
            Background("a", partial(train_one, running, "a", mine, tmp_path)),
            Background("b", partial(train_one, running, "b", sites()["b"], tmp_path)),
        ]
        for client in second:
            client.join()
        running.service.join()
    assert [round for round, _ in sent[-2:]] == [2, 2]
    assert sent[-2][1] == sent[-1][1]


def test_a_latecomer_is_told_everything(model: Path, tmp_path: Path) -> None:
    job = job_of(model, BOTH_WAYS["sparse"], rounds=4, cohort={"clients": 1, "quorum": 1})
    watch = Watch()
    outcomes: dict[str, Outcome] = {}
    with serving(job, tmp_path, NAMES) as running:
        late: list[Background] = []

        def run(name: str) -> None:
            outcomes[name] = train_one(running, name, watch.sites()[name], tmp_path, heard if name == "a" else None)

        def heard(event: dict[str, Any]) -> None:
            if event["event"] == "step" and event["round"] == 1 and not late:
                late.append(Background("b", partial(run, "b")))
                service = running.running.service
                assert service is not None
                while late[0].thread.is_alive() and not service.rounds.lobby:
                    late[0].thread.join(0.01)

        run("a")
        late[0].join()
        running.service.join()
    first, *later = watch.trunks["b"].boundaries
    assert first.round == 2
    assert first.averages
    assert not first.pieces
    assert len(later) == 2
    assert all(boundary.pieces and not boundary.averages for boundary in later)
    mine, theirs = outcomes["a"].parts.parameters, outcomes["b"].parts.parameters
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_full_density_in_float32_is_what_it_was(model: Path, tmp_path: Path) -> None:
    """Values travel, not differences, and nothing more is kept."""
    job = job_of(model, {"update": "float32", "update_density": 1.0, "average": "float32", "average_density": 1.0})
    plain = make_job(model, Case(("head", "trunk", "tail"), len(NAMES), method=LORA))
    rounds = {"count": 3, "local_steps": 2, "weighting": "rows"}
    plain = parse_job(plain.model_dump(mode="json") | {"rounds": plain.rounds.model_dump() | rounds}, "job")
    assert plain.canonical() == job.canonical()
    watch = Watch()
    train_in_process(job, watch.sites(), tmp_path)
    for name in NAMES:
        assert watch.trunks[name].sent == []
        assert all(boundary.averages for boundary in watch.trunks[name].boundaries[1:])
        assert not any(boundary.pieces for boundary in watch.trunks[name].boundaries)
        assert of(tmp_path / name, 3, "unsent/") == {}
    assert of(tmp_path / "server-state", 3, "unsent/") == {}


def test_everything_sent_in_float32_pieces_trains_like_whole_values(model: Path, tmp_path: Path) -> None:
    """A density so near to 1 that nothing is left out: the way through differences changes roundings alone."""
    dense = results(tmp_path / "dense", train_in_process(job_of(model, {}), sites(), tmp_path / "dense"))
    almost = {"update_density": 1 - 1e-9, "average_density": 1 - 1e-9}
    # One value of all is left out in either direction, for one round.
    pieces = results(tmp_path / "pieces", train_in_process(job_of(model, almost), sites(), tmp_path / "pieces"))
    for name, value in dense.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        {"split": {"trunk": "client"}},
        {"cohort": {"adapters": "per_client"}},
        {"cohort": {"mode": "greedy"}},
        {"aggregation": {"type": "fedavgm", "max_update_norm": 0.05}},
    ],
)
def test_it_goes_with_every_kind_of_round(other: dict[str, Any], model: Path, tmp_path: Path) -> None:
    job = job_of(model, BOTH_WAYS["sparse, quantised"], **other)
    outcomes = train_in_process(job, sites(), tmp_path)
    start = beginning(job)
    trained = {name: outcome.parts.parameters for name, outcome in outcomes.items()}
    assert all(torch.equal(value, trained["b"][name]) for name, value in trained["a"].items())
    assert any(not torch.equal(value, start[name]) for name, value in trained["a"].items())


def test_a_longer_run_both_ways_learns(model: Path, tmp_path: Path) -> None:
    """Ten rounds on a few rows, a tenth of the values either way: the loss on them falls, nearly as far as dense."""

    def fall(wire: dict[str, Any], folder: Path) -> float:
        values = job_of(model, wire, rounds=10, method=Full()).model_dump(mode="json")
        values["training"] |= {"learning_rate": 0.01}
        outcomes = train_in_process(parse_job(values, "job"), sites(), folder)
        losses: list[float] = [event["loss"] for event in outcomes["a"].events if event["event"] == "step"]
        return sum(losses[:4]) / 4 - sum(losses[-4:]) / 4

    sparse = fall({"update_density": 0.1, "average_density": 0.1}, tmp_path / "sparse")
    dense = fall({}, tmp_path / "dense")
    assert dense > 0.5
    assert sparse > dense / 2


Spoil = Callable[[Sequence[Piece], Sequence[bytes]], tuple[Sequence[Piece], Sequence[bytes]]]


def out_of_range(sent: Sequence[Piece], frames: Sequence[bytes]) -> tuple[Sequence[Piece], Sequence[bytes]]:
    """All low bits set and all high ones as far up as they go: the last position lies beyond the end."""
    length, count = sent[0].length, sent[0].values.shape[0]
    low_bits = (length // count).bit_length() - 1
    low = (1 << count * low_bits) - 1
    high_size = count + (length - 1 >> low_bits)
    high = (1 << count) - 1 << high_size - count
    raw = low.to_bytes(-(-count * low_bits // 8), "little") + high.to_bytes(-(-high_size // 8), "little")
    return sent, [raw + frames[0][len(raw) :]]


def twice(sent: Sequence[Piece], frames: Sequence[bytes]) -> tuple[Sequence[Piece], Sequence[bytes]]:
    """The first position again in place of the second."""
    length, count = sent[0].length, sent[0].values.shape[0]
    low_bits = (length // count).bit_length() - 1
    high = 1 | 2 | sum(1 << 5 + number for number in range(2, count))
    high_size = count + (length - 1 >> low_bits)
    raw = bytes(-(-count * low_bits // 8)) + high.to_bytes(-(-high_size // 8), "little")
    return sent, [raw + frames[0][len(raw) :]]


def not_a_number(sent: Sequence[Piece], frames: Sequence[bytes]) -> tuple[Sequence[Piece], Sequence[bytes]]:
    return sent, [frames[0][:-4] + np.float32("nan").tobytes()]


def too_many(sent: Sequence[Piece], frames: Sequence[bytes]) -> tuple[Sequence[Piece], Sequence[bytes]]:
    length, most = sent[0].length, sent[0].values.shape[0] + 1
    values = sent[0].values.model_copy(update={"shape": (most,)})
    return [Piece(length=length, values=values)], [positions.encode(np.arange(most), length) + bytes(4 * most)]


def none_at_all(sent: Sequence[Piece], frames: Sequence[bytes]) -> tuple[Sequence[Piece], Sequence[bytes]]:
    return (), ()


@dataclass(frozen=True)
class Spoiling(RemoteTrunk):
    spoil: Spoil = none_at_all

    def update_in_part(self, round: int, weight: int, difference: Compressed) -> Boundary:
        pieces, frames = self.spoil(difference.pieces, difference.frames)
        spoilt = Compressed(tuple(pieces), tuple(frames), difference.sent, difference.unsent)
        return super().update_in_part(round, weight, spoilt)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (out_of_range, "do not ascend"),
        (twice, "do not ascend"),
        (not_a_number, "NaN or infinite"),
        (too_many, "the job's density allows"),
        (none_at_all, "pieces of 0 values"),
    ],
)
def test_a_bad_update_is_counted_and_the_round_goes_on(spoil: Spoil, said: str, model: Path, tmp_path: Path) -> None:
    job = job_of(model, {"update_density": 0.1, "average_density": 0.2}, rounds=2)

    def trunk(link: Link, job: Job, parts: HeadTail, timeout_s: float) -> RemoteTrunk:
        return Spoiling(link, job, timeout_s, spoil)

    clients = {"a": sites()["a"], "b": sites(trunk)["b"]}
    outcomes: dict[str, Outcome] = {}
    with serving(job, tmp_path, NAMES) as running:

        def run(name: str) -> None:
            outcomes[name] = train_one(running, name, clients[name], tmp_path)

        for client in [Background(name, partial(run, name)) for name in NAMES]:
            client.join()
        service = running.running.service
        running.service.join()
        assert service is not None
        assert service.counters["refused_tensor"] == 2
    refused = [event for event in outcomes["b"].events if event["event"] == "update_refused"]
    assert [event["round"] for event in refused] == [0, 1]
    assert all(said in event["reason"] for event in refused)
    assert [e["members"] for e in outcomes["a"].events if e["event"] == "round"] == [2, 2]
    # It stays a member and holds what all hold; of rounds that did not count it keeps nothing.
    mine, theirs = outcomes["a"].parts.parameters, outcomes["b"].parts.parameters
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert of(tmp_path / "b", 2, "unsent/") == {}
    assert of(tmp_path / "a", 2, "unsent/")


@pytest.mark.slow
def test_replicas_tell_their_clients_the_same(model: Path, tmp_path: Path) -> None:
    """Two servers, a client each: what is told, and what is untold, is the same at both after every round."""
    save_word_tokenizer(model)
    job = job_of(model, BOTH_WAYS["sparse, quantised"])
    rows = {name: write_random_rows(tmp_path / f"{name}.jsonl", 8, seed) for seed, name in enumerate(NAMES)}
    people = [local_run.Site(name, path, path) for name, path in rows.items()]
    local_run.train_together(job, people, tmp_path / "run", replicas=2)
    states = [tmp_path / "run" / "server-state" / f"replica-{replica}" for replica in range(2)]
    for number in (2, 3):
        for prefix in ("average/", "unsent/"):
            first, second = (of(state, number, prefix) for state in states)
            assert first
            assert different(first, second) == []


def test_a_server_that_lost_everything_and_its_clients_begin_anew_and_end_as_they_did(
    model: Path, tmp_path: Path
) -> None:
    job = job_of(model, BOTH_WAYS["down"], rounds=4)
    first = results(tmp_path, train_in_process(job, sites(), tmp_path))
    (tmp_path / "server-state").rename(tmp_path / "lost")
    assert different(first, results(tmp_path, train_in_process(job, sites(), tmp_path))) == []


def test_who_lost_what_the_first_round_began_with_cannot_begin_anew(model: Path, tmp_path: Path) -> None:
    job = job_of(model, {}, rounds=4, cohort={"quorum": 1})
    train_in_process(job, sites(), tmp_path)
    (tmp_path / "server-state").rename(tmp_path / "lost")
    with serving(job, tmp_path, NAMES) as running:
        for name in NAMES:
            shutil.rmtree(tmp_path / name / "checkpoint-0")
        clients = [Background(n, partial(train_one, running, n, site, tmp_path)) for n, site in sites().items()]
        for client in clients:
            with pytest.raises(CheckpointError, match="checkpoint-0 is not there to begin with"):
                client.join()
        running.running.stop()
