"""Replicas of the trunk: means over real process groups, as processes, with one that dies and one without clients."""

import multiprocessing as mp
import queue
from collections.abc import Callable
from typing import Any

import pytest
import torch

from launcher.local_run import free_port
from shared.errors import ConnectionFailed, UsageError
from shared.job import parse_job
from worker_server.aggregators.method import Update
from worker_server.replicas import Place, Replicas, device_of, place_of
from worker_server.round_end import Aggregated, aggregate
from worker_server.settings import ServerSettings

WAIT_S = 60.0


def averages(replicas: Replicas) -> Any:
    """Rank r holds r + 1 everywhere, with weight 1 for the first and 3 for the second."""
    rank = replicas.place.replica
    values = {"a": torch.full((2, 3), rank + 1.0), "b": torch.full((4,), 10.0 * (rank + 1))}
    if rank == 1:  # read back from a checkpoint, names come in another order
        values = dict(reversed(values.items()))
    mean = replicas.mean(values, (1, 3)[rank])
    unweighted = replicas.mean(values, 0)
    return mean["a"].tolist(), mean["b"].tolist(), unweighted["a"].tolist(), replicas.earliest(5 - rank)


def notes(replicas: Replicas) -> Any:
    """The second hears that the first ends its round, without waiting for it."""
    before = replicas.ending(7)
    if replicas.place.replica == 0:
        replicas.announce_end(7)
    replicas.earliest(0)
    return (before if replicas.place.replica == 0 else None), replicas.ending(7), replicas.ending(8)


def clients(replicas: Replicas) -> Any:
    """Each hears when both have their clients."""
    before = replicas.all_have_clients() if replicas.place.replica == 0 else None
    replicas.earliest(0)
    replicas.announce_clients()
    replicas.earliest(0)
    return before, replicas.all_have_clients()


AGGREGATIONS: list[dict[str, Any]] = [
    {"type": "fedadam", "server_learning_rate": 0.1, "max_update_norm": 1.5},
    {"type": "fedavg", "lora": "exact"},
]
FACTORS = ("x.lora_A.default.weight", "x.lora_B.default.weight")


def rounds_of_updates(clients: slice) -> list[list[Update]]:
    """Two rounds of three clients' updates; those of some of them."""
    generator = torch.Generator().manual_seed(3)
    rounds = [
        [
            Update(name, weight, {factor: torch.randn(2, 2, generator=generator) for factor in FACTORS})
            for name, weight in (("a", 5), ("b", 1), ("c", 14))
        ]
        for _ in range(2)
    ]
    return [updates[clients] for updates in rounds]


def aggregated(aggregation: dict[str, Any], clients: slice, replicas: Replicas | None) -> dict[str, list[float]]:
    """Values and state after two rounds, a third in which nobody has an update changes nothing."""
    values = {"model_name_or_path": "m", "cohort": {"clients": 3}, "aggregation": aggregation | {"secure": "off"}}
    job = parse_job(values, "job")
    result = Aggregated({factor: torch.full((2, 2), 0.5) for factor in FACTORS}, {})
    for updates in [*rounds_of_updates(clients), []]:
        result = aggregate(job, result.values, updates, result.state, replicas)
    return {name: value.flatten().tolist() for name, value in {**result.values, **result.state}.items()}


def aggregates(replicas: Replicas) -> Any:
    """The first has two of three clients, the second one."""
    mine = (slice(0, 2), slice(2, 3))[replicas.place.replica]
    return [aggregated(aggregation, mine, replicas) for aggregation in AGGREGATIONS]


def noises(replicas: Replicas) -> Any:
    """The values after a round under central privacy, of one update a replica; and the noise of a second draw."""
    privacy = {"type": "central", "clip_norm": 3.0, "noise_multiplier": 2.0, "delta": 1e-5}
    shared = {"rounds": {"weighting": "clients"}, "training": {"parts": ["head"]}, "cohort": {"clients": 2}}
    job = parse_job({"model_name_or_path": "m", "privacy": privacy, **shared}, "job")
    start = {"x": torch.zeros(10_000)}
    update = Update(str(replicas.place.replica), 1, {"x": torch.full((10_000,), 0.01 * replicas.place.replica)})
    return [aggregate(job, start, [update], {}, replicas).values["x"].tolist() for _ in range(2)]


def dies(replicas: Replicas) -> Any:
    if replicas.place.replica == 1:
        return None
    try:
        replicas.mean({"a": torch.zeros(2)}, 1)
    except ConnectionFailed as error:
        return error.message, error.hint
    return "no error"


def _process(port: int, rank: int, action: Callable[[Replicas], Any], results: Any) -> None:
    replicas = Replicas(Place(rank, 2, "127.0.0.1", port, rank == 0), "cpu", 10.0)
    results.put((rank, action(replicas)))
    if action is not dies:
        replicas.close()


def run(action: Callable[[Replicas], Any]) -> dict[int, Any]:
    context = mp.get_context("spawn")
    results: Any = context.Queue()
    port = free_port()
    processes = [context.Process(target=_process, args=(port, rank, action, results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        return dict(results.get(timeout=WAIT_S) for _ in processes)
    except queue.Empty:
        pytest.fail("the replicas did not answer")
    finally:
        for process in processes:
            process.join(WAIT_S)
            process.kill()


def test_means_are_weighted_and_the_same_on_all() -> None:
    results = run(averages)
    assert results[0][:2] == results[1][:2] == ([[1.75] * 3] * 2, [17.5] * 4)
    assert results[0][2] == [[1.0] * 3] * 2  # no weight anywhere: each keeps its own
    assert results[1][2] == [[2.0] * 3] * 2
    assert results[0][3] == results[1][3] == 4


def test_replicas_aggregate_as_one_server_would_and_all_the_same() -> None:
    results = run(aggregates)
    assert results[0] == results[1]
    for aggregation, together in zip(AGGREGATIONS, results[0], strict=True):
        alone = aggregated(aggregation, slice(0, 3), None)
        assert alone.keys() == together.keys()
        for name, values in alone.items():
            assert together[name] == pytest.approx(values, rel=1e-5, abs=1e-7), name


def test_replicas_add_one_noise_together_and_the_same() -> None:
    """3.0 x 2.0 / 2 updates, around the mean of 0 and 0.01; of each one's own it would be less, or not the same."""
    results = run(noises)
    assert results[0] == results[1]
    first, second = (torch.tensor(values, dtype=torch.float64) for values in results[0])
    for values in (first, second):
        assert float(values.std()) == pytest.approx(3.0, rel=0.03)
        assert float(values.mean()) == pytest.approx(0.005, abs=0.15)
    assert abs(float((first * second).mean())) < 0.5


def test_the_end_of_a_round_is_heard_without_waiting() -> None:
    assert run(notes) == {0: (False, True, False), 1: (None, True, False)}


def test_that_all_have_their_clients_is_heard_without_waiting() -> None:
    assert run(clients) == {0: (False, True), 1: (None, True)}


def test_a_replica_that_is_gone_is_said_with_what_to_do() -> None:
    message, hint = run(dies)[0]
    assert "other replicas" in message
    assert "start all replicas again" in hint


def test_replicas_that_do_not_come_are_waited_for_a_bounded_time() -> None:
    with pytest.raises(ConnectionFailed, match="were not all there within 1 s"):
        Replicas(Place(1, 2, "127.0.0.1", free_port(), False), "cpu", 1.0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"replicas": 2, "rendezvous": "tcp://host:29500"}, Place(0, 2, "host", 29500, True)),
        ({"replicas": 3, "replica": 2, "rendezvous": "tcp://host:29500"}, Place(2, 3, "host", 29500, False)),
    ],
)
def test_where_replicas_meet(settings: dict[str, Any], expected: Place | None) -> None:
    assert place_of(ServerSettings(**settings)) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"replicas": 2}, "need --rendezvous"),
        ({"replicas": 2, "rendezvous": "host:1"}, "need --rendezvous"),
        ({"replicas": 2, "replica": 2, "rendezvous": "tcp://host:1"}, "count from 0"),
        ({"rendezvous": "env"}, "needs RANK"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        place_of(ServerSettings(**settings))


@pytest.mark.parametrize(("agent", "hosts"), [("True", False), ("False", True)])
def test_torchruns_environment_is_understood(agent: str, hosts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "node", "MASTER_PORT": "29500"}
    for name, value in {**values, "TORCHELASTIC_USE_AGENT_STORE": agent}.items():
        monkeypatch.setenv(name, value)
    assert place_of(ServerSettings(rendezvous="env")) == Place(0, 4, "node", 29500, hosts)


def test_under_torchrun_each_process_of_a_machine_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device_of(ServerSettings(device="cuda", rendezvous="env")) == "cuda:3"
    assert device_of(ServerSettings(device="cuda")) == "cuda"
    assert device_of(ServerSettings(device="cpu", rendezvous="env")) == "cpu"
