"""Who takes part in whole runs, against plain PyTorch: drawn clients, late joiners, weights by rows, personal parts;
and a slow client that adaptive deadlines leave behind.
"""

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.fidelity import random_rows
from benchmarks.plain import load_plain, mean_loss, row_logits
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from launcher.in_process import Background, Outcome, Serving, Site, serving, train_in_process, train_one, trunk_tensors
from shared import state_files
from shared.errors import ConnectionFailed, JobError
from shared.identity import generate_identity
from shared.job import Job, parse_job
from shared.model.checkpoint import Checkpoint
from shared.model.plan import SplitPlan
from shared.model.trainable import initial_values, update_shapes
from worker_client.batches import batch_indices, pack_rows
from worker_client.client import _write_result
from worker_client.data import Row
from worker_client.evaluation.local_model import Trained, load_local_model
from worker_client.head_tail import load_client_parts
from worker_client.remote_trunk import RemoteTrunk
from worker_server.server import Server
from worker_server.settings import ServerSettings

NAMES = ("a", "b", "c", "d", "e")
ROUNDS, STEPS, RATE, SEED = 4, 2, 1e-2, 7
EPSILON = 1e-4  # AdamW's: with a smaller one it blows the rounding of gradients that are nearly 0 up to steps
WAIT_S = 60.0


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


def job_of(model: Path, cohort: dict[str, Any], parts: Sequence[str] = ("head", "tail"), **sections: Any) -> Job:
    """AdamW, clipping, a linear schedule; head and tail are trained, and averaged after each round."""
    training = {"per_device_train_batch_size": 4, "learning_rate": RATE, "adam_epsilon": EPSILON, "seed": SEED}
    values: dict[str, Any] = {
        "model_name_or_path": str(model),
        "method": {"type": "full"},
        "training": {"parts": parts, **training},
        "rounds": {"count": ROUNDS, "local_steps": STEPS},
        "cohort": cohort,
        "aggregation": {"type": "fedavg"},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return parse_job(values, "job")


def rows_of(names: Sequence[str], counts: Mapping[str, int] | None = None) -> dict[str, list[Row]]:
    return {name: random_rows((counts or {}).get(name, 8), seed) for seed, name in enumerate(names)}


def sites(rows: Mapping[str, list[Row]]) -> dict[str, Site]:
    return {name: Site(mine) for name, mine in rows.items()}


def takes_part(outcomes: Mapping[str, Outcome]) -> list[list[str]]:
    """The members of each round, by what the clients say."""
    return [
        sorted(
            name
            for name, outcome in outcomes.items()
            if any(event["event"] == "round" and event["round"] == round for event in outcome.events)
        )
        for round in range(ROUNDS)
    ]


def drawn_by_hash(names: Sequence[str], count: int) -> list[list[str]]:
    """docs/protocol.md, "Sampling"."""
    return [
        sorted(sorted(names, key=lambda name: hashlib.sha256(f"{SEED} round {round} {name}".encode()).digest())[:count])
        for round in range(ROUNDS)
    ]


def simulated(
    job: Job, rows: Mapping[str, list[Row]], members: Sequence[Sequence[str]], shared: set[str], trained: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """Each client's values after the job: FedAvg of the `shared` ones over each round's members, on one whole model.

    Each client has an AdamW of its own; rates follow the number of the round. The others of `trained` stay its own.
    """
    model = load_plain(job.model_name_or_path)
    model.requires_grad_(False)
    by_name = dict(model.named_parameters())
    parameters = {name: by_name[name].requires_grad_() for name in trained}
    first = {name: p.detach().clone() for name, p in parameters.items()}
    joint = {name: first[name] for name in shared}
    own: dict[str, dict[str, Tensor]] = {name: {n: v for n, v in first.items() if n not in shared} for name in rows}
    moments: dict[str, Any] = {}
    for round, of_round in enumerate(members):
        sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in joint.items()}
        total = 0
        for client in of_round:
            _set(parameters, joint | own[client])
            optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, eps=EPSILON, weight_decay=0.0)
            if client in moments:
                optimizer.load_state_dict(moments[client])
            tokens = 0
            for step in range(round * STEPS, (round + 1) * STEPS):
                mine = rows[client]
                batch = [mine[i] for i in batch_indices(len(mine), 4, step, SEED)]
                optimizer.param_groups[0]["lr"] = RATE * (1 - step / (ROUNDS * STEPS))
                optimizer.zero_grad()
                torch.autograd.backward(mean_loss(model, batch))
                nn.utils.clip_grad_norm_(parameters.values(), 1.0)
                optimizer.step()
                tokens += sum(row.target_tokens for row in batch)
            moments[client] = optimizer.state_dict()
            own[client] = {name: parameters[name].detach().clone() for name in own[client]}
            weight = len(rows[client]) if job.rounds.weighting == "rows" else tokens
            total += weight
            for name in joint:
                sums[name] += weight * parameters[name].detach().double()
        joint = {name: (value / total).float() for name, value in sums.items()}
    return {client: joint | mine for client, mine in own.items()}


def _set(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].data.copy_(value)


def assert_simulated(
    job: Job, rows: Mapping[str, list[Row]], outcomes: Mapping[str, Outcome], members: Sequence[Sequence[str]]
) -> dict[str, dict[str, Tensor]]:
    parts = next(iter(outcomes.values())).parts
    expected = simulated(job, rows, members, set(parts.shared), list(parts.parameters))
    for name, outcome in outcomes.items():
        for key, value in outcome.parts.parameters.items():
            torch.testing.assert_close(value.detach(), expected[name][key], rtol=1e-4, atol=2e-6)
    return expected


def furthest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


def values_of(outcome: Outcome) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in outcome.parts.parameters.items()}


# Sampling


@pytest.mark.parametrize("trunk", ["server", "client"])
def test_a_round_averages_exactly_those_who_were_drawn(trunk: str, model: Path, tmp_path: Path) -> None:
    job = job_of(model, {"clients": 5, "sampled": 2}, split={"trunk": trunk})
    rows = rows_of(NAMES)
    outcomes = train_in_process(job, sites(rows), tmp_path)
    members = takes_part(outcomes)
    assert members == drawn_by_hash(NAMES, 2)
    assert len({name for of_round in members for name in of_round}) > 2
    assert not any(event["event"] == "rounds_missed" for outcome in outcomes.values() for event in outcome.events)
    expected = assert_simulated(job, rows, outcomes, members)
    everybody = simulated(job, rows, [NAMES] * ROUNDS, set(outcomes["a"].parts.shared), list(expected["a"]))
    assert furthest(expected["a"], everybody["a"]) > 1e-3


@pytest.mark.parametrize(("sampled", "rounds_at_most"), [(None, 1), (2, ROUNDS)])
def test_who_may_not_be_drawn_before_the_last_round_waits_for_all_of_them(
    sampled: int | None, rounds_at_most: int, model: Path, tmp_path: Path
) -> None:
    job = job_of(model, {"clients": 5, "sampled": sampled})
    with serving(job, tmp_path, ["a"]) as running, running.link("a") as link:
        assert RemoteTrunk(link, job, 60.0).round_timeout_s == 60 * rounds_at_most


@pytest.mark.parametrize("mode", [{"mode": "greedy"}, {"mode": "greedy", "adapters": "per_client"}])
def test_greedily_the_same_are_drawn(mode: dict[str, Any], model: Path, tmp_path: Path) -> None:
    job = job_of(
        model, {"clients": 5, "sampled": 2, **mode}, ("head", "trunk", "tail"), method={"type": "lora", "r": 2}
    )
    outcomes = train_in_process(job, sites(rows_of(NAMES)), tmp_path)
    assert takes_part(outcomes) == drawn_by_hash(NAMES, 2)
    assert all(outcome.events[-1]["event"] == "finished" for outcome in outcomes.values())


class Killed(Exception):
    """Stands for kill -9 of a client: it says nothing more."""


def to_the_end(running: Serving, name: str, site: Site, folder: Path, report: Any, stopped: threading.Event) -> None:
    """A client that comes back until the server has stopped, whatever happened to its session or to itself."""
    while True:
        try:
            train_one(running, name, site, folder, report)
        except (ConnectionFailed, Killed):
            if stopped.is_set():
                return
        else:
            return


def all_to_the_end(
    running: Serving, clients: Mapping[str, Site], folder: Path, reports: Mapping[str, Any], stopped: threading.Event
) -> None:
    threads = [
        Background(name, partial(to_the_end, running, name, site, folder, reports.get(name), stopped))
        for name, site in clients.items()
    ]
    for thread in threads:
        thread.join()
    running.service.join()


def kill_at(round: int) -> Any:
    """Once, after the last step of that round: the other members have saved what they made of it."""
    done = threading.Event()

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == (round + 1) * STEPS - 1 and not done.is_set():
            done.set()
            raise Killed

    return report


def end_of(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """All that was trained: at the server, and at the clients, whose last checkpoints may be of different rounds."""
    found = {f"trunk/{name}": value for name, value in trunk_tensors(folder).items()}
    for who in ("server-state", *names):
        tensors, _ = state_files.load(folder / who, state_files.numbers(folder / who)[-1])
        found |= {
            f"{who}/{name}": value
            for name, value in tensors.items()
            if name.startswith(("average/", "trained/", "optimizer/", "client/"))
        }
    return found


SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lockstep": ({}, {}),
    "per_client": ({"adapters": "per_client"}, {"method": {"type": "lora", "r": 2}}),
    "plain_fedavg": ({}, {"split": {"trunk": "client"}}),
    "personal tail": ({}, {"aggregation": {"personal": ["tail"]}}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_killed_again_and_again_it_ends_bit_equal(shape: str, model: Path, tmp_path: Path) -> None:
    """A drawn client in its round, then the server in the next: both come back, and who was drawn is waited for."""
    cohort, sections = SHAPES[shape]
    job = job_of(model, {"clients": 4, "sampled": 2, **cohort}, ("head", "trunk", "tail"), **sections)
    clients = sites(rows_of(NAMES[:4]))
    train_in_process(job, clients, tmp_path / "whole")
    members = drawn_by_hash(NAMES[:4], 2)
    cut, stopped = tmp_path / "cut", threading.Event()
    with serving(job, cut, NAMES[:4], farewell_s=2.0) as running:

        def stop_server(event: dict[str, Any]) -> None:
            if event["event"] == "step" and event["round"] == 2:
                stopped.set()
                running.running.stop()

        killed = members[1][0]
        stopper = next(name for name in members[2] if name != killed)
        all_to_the_end(running, clients, cut, {killed: kill_at(1), stopper: stop_server}, stopped)
    assert state_files.numbers(cut / "server-state")[-1] == 2
    with serving(job, cut, NAMES[:4]) as running:
        all_to_the_end(running, clients, cut, {members[3][0]: kill_at(3)}, threading.Event())
    whole, again = end_of(tmp_path / "whole", NAMES[:4]), end_of(cut, NAMES[:4])
    assert whole.keys() == again.keys()
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


def test_replicas_that_would_draw_from_their_own_clients_are_refused(model: Path, tmp_path: Path) -> None:
    settings = ServerSettings(replicas=2, rendezvous="tcp://127.0.0.1:1", state=tmp_path / "state")
    server = Server(settings, job_of(model, {"clients": 4, "sampled": 2}), generate_identity("server"), dict)
    with pytest.raises(JobError, match=r"cohort\.sampled=2 draws from all clients"):
        server.run()


# Weights, late joiners, personal parts


@pytest.mark.parametrize("weighting", ["rows", "tokens"])
def test_a_mean_weighs_clients_by_what_the_job_says(weighting: str, model: Path, tmp_path: Path) -> None:
    """Clients of 2, 8 and 20 rows, all of which train on equally many batches."""
    job = job_of(model, {"clients": 3}, rounds={"weighting": weighting})
    rows = rows_of(NAMES[:3], {"a": 2, "b": 8, "c": 20})
    outcomes = train_in_process(job, sites(rows), tmp_path)
    expected = assert_simulated(job, rows, outcomes, [NAMES[:3]] * ROUNDS)
    values = job.model_dump(mode="json")
    values["rounds"]["weighting"] = "tokens" if weighting == "rows" else "rows"
    other = simulated(
        parse_job(values, "job"), rows, [NAMES[:3]] * ROUNDS, set(outcomes["a"].parts.shared), list(expected["a"])
    )
    assert furthest(expected["a"], other["a"]) > 1e-3


def until(condition: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("personal", [[], ["tail"]])
def test_who_joins_while_the_job_runs_is_averaged_from_the_next_round_on(
    personal: list[str], model: Path, tmp_path: Path
) -> None:
    """It begins with the averages and personal parts of its own, at the place of the schedule where the others are."""
    job = job_of(model, {"clients": 2}, aggregation={"personal": personal})
    rows = rows_of(NAMES[:3])
    outcomes: dict[str, Outcome] = {}
    with serving(job, tmp_path, NAMES[:3]) as running:
        arrived = threading.Event()

        def wait_for_c(event: dict[str, Any]) -> None:
            if event["event"] == "step" and event["step"] == STEPS:  # the first of round 1
                arrived.set()
                service = running.running.service
                assert service is not None
                until(lambda: service.rounds.lobby)

        def run(name: str, report: Any = None) -> None:
            outcomes[name] = train_one(running, name, Site(rows[name]), tmp_path, report)

        first = [Background("a", partial(run, "a", wait_for_c)), Background("b", partial(run, "b"))]
        assert arrived.wait(WAIT_S)
        run("c")
        for thread in first:
            thread.join()
        running.service.join()
    members = takes_part(outcomes)
    assert members == [["a", "b"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c"]]
    assert_simulated(job, rows, outcomes, members)


def test_a_personal_tail_stays_and_a_shared_head_is_averaged(model: Path, tmp_path: Path) -> None:
    job = job_of(model, {"clients": 3}, aggregation={"personal": ["tail"]})
    rows = rows_of(NAMES[:3])
    outcomes = train_in_process(job, sites(rows), tmp_path)
    assert_simulated(job, rows, outcomes, [NAMES[:3]] * ROUNDS)
    a, b = (values_of(outcomes[name]) for name in ("a", "b"))
    heads = set(outcomes["a"].parts.shared)
    assert heads
    assert heads < a.keys()
    assert {name.split(".")[1] for name in heads} == {"embed_tokens", "layers"}
    assert not any(name.startswith(("lm_head", "model.norm", "model.layers.3")) for name in heads)
    assert all(torch.equal(a[name], b[name]) for name in heads)
    assert all(not torch.equal(a[name], b[name]) for name in a.keys() - heads)
    for number in range(1, ROUNDS + 1):
        if number in state_files.numbers(tmp_path / "server-state"):
            kept, _ = state_files.load(tmp_path / "server-state", number)
            assert {name.removeprefix("average/") for name in kept if name.startswith("average/")} == heads
    plan = SplitPlan(1, 1, 4)
    checkpoint = Checkpoint(str(model))
    assert update_shapes(checkpoint.config, plan, job).keys() == heads
    assert initial_values(checkpoint, plan, job).keys() == heads


@pytest.mark.parametrize("personal", [["head"], ["head", "tail"]])
def test_any_client_part_may_be_personal_and_methods_of_aggregation_take_the_rest(
    personal: list[str], model: Path, tmp_path: Path
) -> None:
    """With all of them nothing is handed in, and each client's values are those of a run of its own."""
    job = job_of(model, {"clients": 2}, aggregation={"personal": personal})
    rows = rows_of(NAMES[:2])
    outcomes = train_in_process(job, sites(rows), tmp_path)
    assert_simulated(job, rows, outcomes, [NAMES[:2]] * ROUNDS)
    parts = outcomes["a"].parts
    tail = {name for name in parts.parameters if name.startswith(("lm_head", "model.norm", "model.layers.3"))}
    assert parts.shared.keys() == (tail if personal == ["head"] else set())


@pytest.mark.parametrize("aggregation", [{"proximal_mu": 0.3}, {"lora": "exact"}, {"type": "fedadam"}])
def test_what_methods_add_keeps_off_personal_parts(aggregation: dict[str, Any], model: Path, tmp_path: Path) -> None:
    job = job_of(
        model, {"clients": 2}, method={"type": "lora", "r": 2}, aggregation={"personal": ["tail"], **aggregation}
    )
    outcomes = train_in_process(job, sites(rows_of(NAMES[:2])), tmp_path)
    a, b = outcomes["a"].parts, outcomes["b"].parts
    assert all(torch.equal(value, b.shared[name]) for name, value in a.shared.items())
    tails = a.parameters.keys() - a.shared.keys()
    assert any(not torch.equal(a.parameters[name], b.parameters[name]) for name in tails)
    told = {module for module in a.residuals.added if module.startswith("model.layers.3")}
    assert told == set()
    assert bool(a.residuals.added) == (aggregation.get("lora") == "exact")


def test_tied_weights_are_personal_in_both_parts_or_in_neither(tmp_path: Path) -> None:
    tied = save_tiny_model("llama", tmp_path / "tied", tied=True)
    job = job_of(tied, {"clients": 2}, aggregation={"personal": ["tail"]})
    with pytest.raises(JobError, match="tie_word_embeddings"):
        load_client_parts(Checkpoint(str(tied)), job)
    with pytest.raises(JobError, match="name both or neither"):
        update_shapes(Checkpoint(str(tied)).config, SplitPlan(1, 1, 4), job)
    both = load_client_parts(
        Checkpoint(str(tied)), job_of(tied, {"clients": 2}, aggregation={"personal": ["head", "tail"]})
    )
    assert both.shared == {}
    alone = load_client_parts(
        Checkpoint(str(tied)), job_of(tied, {"clients": 2}, ("tail",), aggregation={"personal": ["tail"]})
    )
    assert alone.shared == {}
    assert alone.parameters


def test_the_result_has_the_personal_parts_and_is_evaluated_with_them(model: Path, tmp_path: Path) -> None:
    save_word_tokenizer(model)
    job = job_of(model, {"clients": 2}, aggregation={"personal": ["tail"]})
    rows = rows_of(NAMES[:2])
    outcomes = train_in_process(job, sites(rows), tmp_path)
    for name in ("a", "b"):
        _write_result(tmp_path / name, job, outcomes[name].parts, None)
        result = load_file(tmp_path / name / "trained.safetensors")
        assert result.keys() == outcomes[name].parts.parameters.keys()
        whole = load_plain(str(model))
        by_name = dict(whole.named_parameters())
        _set(by_name, result)
        batch = pack_rows(rows["a"][:3])
        local = load_local_model(str(model), trained_by=Trained(tmp_path / name, None))
        with torch.no_grad():
            expected = torch.cat([row_logits(whole, row) for row in rows["a"][:3]])[batch.at]
        torch.testing.assert_close(local.logits(batch), expected, rtol=1e-4, atol=1e-5)


# Deadlines


@pytest.mark.parametrize("trunk", ["server", "client"])
def test_a_slow_client_is_left_behind_long_before_the_limit_and_comes_back(
    trunk: str, model: Path, tmp_path: Path
) -> None:
    """It stands still until the others have gone on, and then goes on too: with the round after."""
    job = job_of(
        model,
        {"clients": 3, "quorum": 2, "deadline_s": 3600, "deadline_mads": 5},
        aggregation={"secure": "off"},
        rounds={"count": 12, "local_steps": 2 if trunk == "client" else 8},
        split={"trunk": trunk},
    )
    rows = rows_of(NAMES[:3])
    stands_still = 6 * job.rounds.local_steps if trunk == "client" else job.rounds.local_steps + 2
    outcomes: dict[str, Outcome] = {}
    with serving(job, tmp_path, NAMES[:3]) as running:

        def stand_still(event: dict[str, Any]) -> None:
            if event["event"] == "step" and event["step"] == stands_still and not outcomes:
                service = running.running.service
                assert service is not None
                until(lambda: "c" not in service.rounds.active.values())

        def run(name: str) -> None:
            report = stand_still if name == "c" else None
            outcomes[name] = train_one(running, name, Site(rows[name]), tmp_path, report)

        threads = [Background(name, partial(run, name)) for name in NAMES[:3]]
        for thread in threads:
            thread.join()
        running.service.join()
    left = [event["round"] for event in outcomes["c"].events if event["event"] == "left_behind"]
    took_part = [event["round"] for event in outcomes["c"].events if event["event"] == "round"]
    number = stands_still // job.rounds.local_steps
    assert left[0] == number
    assert took_part[: number + 1] == list(range(number + 1))
    assert any(round > number for round in took_part)
    a, c = (values_of(outcomes[name]) for name in ("a", "c"))
    assert all(torch.equal(value, c[name]) for name, value in a.items())
