"""Differential privacy in whole runs: what travels, what all go on from, what it costs, and that nobody pays twice."""

import json
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fidelity import Case, make_job, random_rows, write_random_rows
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from launcher import local_run
from launcher.in_process import CLIENTS, Background, Outcome, Serving, Site, serving, train_in_process, train_one
from shared import state_files
from shared.errors import ConnectionFailed, LedgerError, Refused, SchemaError
from shared.invitations import BrokerAt, Invitation
from shared.job import Job, Lora, parse_job
from worker_client.client import ClientSettings, Result, run_client
from worker_client.head_tail import HeadTail
from worker_client.link import Link
from worker_client.policy import Policy
from worker_client.privacy.accounting import epsilon
from worker_client.privacy.ledger import SUFFIX, digest_of, read_entries
from worker_client.remote_trunk import Boundary, RemoteTrunk

NAMES = ("a", "b", "c")
DELTA = 1e-5


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_tiny_model("llama", tmp_path / "model")
    save_word_tokenizer(folder)
    return folder


def job_of(model: Path, privacy: dict[str, Any] | None, rounds: int = 2, **settings: dict[str, Any]) -> Job:
    """LoRA in head and tail, unless `settings` say otherwise."""
    values = make_job(model, Case(("head", "tail"), len(NAMES), method=Lora(r=2))).model_dump(mode="json")
    values["rounds"] |= {"count": rounds, "local_steps": 2, "weighting": "clients"}
    if privacy is not None:
        values["privacy"] = {"clip_norm": 0.01, "noise_multiplier": 1.0, "delta": DELTA} | privacy
    for section, changes in settings.items():
        values[section] |= changes
    return parse_job(values, "job")


def sites(**made: Any) -> dict[str, Site]:
    return {name: Site(random_rows(8, seed), (), **made.get(name, {})) for seed, name in enumerate(NAMES)}


def flat(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([values[name].double().flatten() for name in sorted(values)])


def under(prefix: str, folder: Path, number: int) -> dict[str, Tensor]:
    tensors, _ = state_files.load(folder, number)
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def differences(folder: Path) -> dict[str, Tensor]:
    """What each client changed in its first round, as one vector."""
    return {
        name: flat(under("trained/", folder / name, 1)) - flat(under("trained/", folder / name, 0)) for name in NAMES
    }


def clipped(difference: Tensor, clip_norm: float) -> Tensor:
    return difference * min(1.0, clip_norm / float(difference.norm()))


def averages(folder: Path, number: int) -> Tensor:
    return flat(under("average/", folder / "server-state", number))


def spent(outcome: Outcome) -> list[dict[str, Any]]:
    return [event for event in outcome.events if event["event"] == "privacy_spent"]


@pytest.mark.parametrize("type", ["central", "local"])
def test_with_next_to_no_noise_it_is_averaging_of_clipped_updates(type: str, model: Path, tmp_path: Path) -> None:
    job = job_of(model, {"type": type, "noise_multiplier": 1e-6}, rounds=1)
    train_in_process(job, sites(), tmp_path)
    own = differences(tmp_path)
    assert min(float(d.norm()) for d in own.values()) > 0.01  # all of them are clipped
    mean = torch.stack([clipped(difference, 0.01) for difference in own.values()]).mean(0)
    start = flat(under("trained/", tmp_path / "a", 0))
    torch.testing.assert_close(averages(tmp_path, 1), start + mean, rtol=0, atol=1e-7)


def test_where_nothing_is_clipped_it_is_plain_averaging_with_equal_weights(model: Path, tmp_path: Path) -> None:
    private = job_of(model, {"type": "central", "clip_norm": 10.0, "noise_multiplier": 1e-6}, rounds=1)
    train_in_process(private, sites(), tmp_path / "private")
    train_in_process(job_of(model, None, rounds=1), sites(), tmp_path / "plain")
    torch.testing.assert_close(averages(tmp_path / "private", 1), averages(tmp_path / "plain", 1), rtol=0, atol=2e-5)
    assert not list((tmp_path / "plain").glob(f"*{SUFFIX}"))


def test_central_noise_is_on_what_all_go_on_from_and_is_paid_for(model: Path, tmp_path: Path) -> None:
    job = job_of(model, {"type": "central", "clip_norm": 0.3, "noise_multiplier": 1.5})
    outcomes = train_in_process(job, sites(), tmp_path)
    handed_in = [flat(under("handed_in/", tmp_path / name, 1)) for name in NAMES]
    for update, whole in zip(handed_in, differences(tmp_path).values(), strict=True):
        torch.testing.assert_close(update, clipped(whole, 0.3), rtol=1e-5, atol=1e-9)
    start = flat(under("trained/", tmp_path / "a", 0))
    noise = averages(tmp_path, 1) - start - torch.stack(handed_in).mean(0)
    assert float(noise.std()) == pytest.approx(1.5 * 0.3 / 3, rel=0.1)
    assert abs(float(noise.mean())) < 0.02
    expected = [epsilon([(1.5, rounds)], DELTA) for rounds in (0, 1, 2)]
    for name, outcome in outcomes.items():
        assert [event["epsilon"] for event in spent(outcome)] == expected[1:]
        begun = [event for event in outcome.events if event["event"] == "round"]
        assert [(event["epsilon"], event["delta"]) for event in begun] == [(e, DELTA) for e in expected[:2]]
        (told,) = [event for event in outcome.events if event["event"] == "privacy"]
        assert told["covers"].endswith("all but the server")
        assert "hidden states and gradients" in told["does_not_cover"]
        assert told["epsilon_of_all_rounds"] == expected[2]
        (entry,) = read_entries(tmp_path / f"{name}{SUFFIX}")
        assert (entry.job, entry.type, entry.noise_multiplier, entry.delta, entry.rounds) == (
            job.digest().hex(), "central", 1.5, DELTA, 2,
        )  # fmt: skip


def test_per_client_adapters_in_the_trunk_are_bounded_with_the_rest(model: Path, tmp_path: Path) -> None:
    """One norm over head, tail and adapter, though the server holds the adapter: next to no noise shows it."""
    parts: dict[str, dict[str, Any]] = {
        "training": {"parts": ["head", "trunk", "tail"]},
        "cohort": {"adapters": "per_client", "clients": 1},
    }
    job = job_of(model, {"type": "central", "noise_multiplier": 1e-6, "clip_norm": 0.01}, rounds=1, **parts)
    train_in_process(job, {"a": Site(random_rows(8, 0))}, tmp_path)
    state = tmp_path / "server-state"
    clients_part = averages(tmp_path, 1) - flat(under("trained/", tmp_path / "a", 0))
    adapter = flat(under("trunk/", state, 1)) - flat(under("trunk/", state, 0))
    assert float(adapter.norm()) > 1e-3
    assert float(clients_part.norm()) > 1e-3
    assert float(torch.cat([clients_part, adapter]).norm()) == pytest.approx(0.01, rel=1e-3)


@dataclass(frozen=True)
class Overhearing(RemoteTrunk):
    """Keeps what is handed in, as it travels."""

    heard: list[tuple[int, int, dict[str, Tensor]]] = field(default_factory=list)

    def update(self, round: int, weight: int, values: Mapping[str, Tensor]) -> Boundary:
        self.heard.append((round, weight, {name: value.clone() for name, value in values.items()}))
        return super().update(round, weight, values)


def overhear(heard: list[Any], link: Link, job: Job, parts: HeadTail, timeout_s: float) -> RemoteTrunk:
    return Overhearing(link, job, timeout_s, heard)


def test_local_noise_is_on_what_travels(model: Path, tmp_path: Path) -> None:
    heard: list[tuple[int, int, dict[str, Tensor]]] = []
    noise = {"type": "local", "clip_norm": 0.05, "noise_multiplier": 2.0}
    job = job_of(model, noise, rounds=1, aggregation={"secure": "off"})
    clients = sites(a={"trunk": partial(overhear, heard)})
    outcomes = train_in_process(job, clients, tmp_path)
    ((round, weight, values),) = heard
    assert (round, weight) == (0, 1)
    start = flat(under("trained/", tmp_path / "a", 0))
    added = flat(values) - start - clipped(differences(tmp_path)["a"], 0.05)
    assert float(added.std()) == pytest.approx(0.1, rel=0.1)
    (told,) = [event for event in outcomes["a"].events if event["event"] == "privacy"]
    assert told["covers"].endswith("everybody")
    assert [event["epsilon"] for event in spent(outcomes["a"])] == [epsilon([(2.0, 1)], DELTA)]


class Killed(Exception):
    """Stands for kill -9 of a client: it says nothing more."""


@pytest.mark.parametrize("type", ["central", "local"])
def test_asked_for_the_same_round_again_the_same_update_leaves_and_costs_nothing(
    type: str, model: Path, tmp_path: Path
) -> None:
    """b dies when a has handed in: the round is undone, and a, sent back, comes again."""
    heard: list[tuple[int, int, dict[str, Tensor]]] = []
    job = job_of(model, {"type": type}, cohort={"clients": 2})
    clients = sites(a={"trunk": partial(overhear, heard)})
    events: list[dict[str, Any]] = []
    with serving(job, tmp_path, NAMES[:2]) as running:

        def insist() -> None:
            while True:
                try:
                    train_one(running, "a", clients["a"], tmp_path, events.append)
                except ConnectionFailed:
                    continue
                return

        stays = Background("a", insist)

        def die(event: dict[str, Any]) -> None:
            if event["event"] == "step" and event["step"] == 3:
                _wait_for(lambda: _updates(running) == ["a"])
                raise Killed

        with pytest.raises(Killed):
            train_one(running, "b", clients["b"], tmp_path, die)
        train_one(running, "b", clients["b"], tmp_path)
        stays.join()
    assert [round for round, _, _ in heard] == [0, 1, 1]
    assert torch.equal(flat(heard[1][2]), flat(heard[2][2]))
    assert not torch.equal(flat(heard[0][2]), flat(heard[1][2]))
    assert [event["round"] for event in events if event["event"] == "update_repeated"] == [1]
    for name in "ab":
        (entry,) = read_entries(tmp_path / f"{name}{SUFFIX}")
        assert entry.rounds == 2


@pytest.mark.parametrize(("type", "paid"), [("central", 6), ("local", 5)])
def test_a_job_that_begins_anew_draws_other_noise_which_costs_again(
    type: str, paid: int, model: Path, tmp_path: Path
) -> None:
    """The server's state is gone, the clients' is not: under local noise the first update is the one that they have."""
    job = job_of(model, {"type": type}, rounds=3, cohort={"clients": 1})
    for _ in range(2):
        train_in_process(job, {"a": Site(random_rows(8, 0))}, tmp_path)
        shutil.rmtree(tmp_path / "server-state")
    assert [entry.rounds for entry in read_entries(tmp_path / f"a{SUFFIX}")] == [paid]


def test_a_job_that_begins_anew_begins_with_what_it_began_with(model: Path, tmp_path: Path) -> None:
    """Not with what the client trained since, of which only the noised is for others."""
    heard: list[tuple[int, int, dict[str, Tensor]]] = []
    job = job_of(model, {"type": "local"}, rounds=3, aggregation={"secure": "off"}, cohort={"clients": 1})
    for _ in range(2):
        train_in_process(job, {"a": Site(random_rows(8, 0), trunk=partial(overhear, heard))}, tmp_path)
        shutil.rmtree(tmp_path / "server-state")
    assert [round for round, _, _ in heard] == [0, 1, 2] * 2
    assert torch.equal(flat(heard[0][2]), flat(heard[3][2]))
    assert not torch.equal(flat(heard[1][2]), flat(heard[4][2]))


@dataclass(frozen=True)
class Forgetting(Overhearing):
    """A server that begins `without` a round's averages."""

    without: int = 1

    def update(self, round: int, weight: int, values: Mapping[str, Tensor]) -> Boundary:
        boundary = super().update(round, weight, values)
        return replace(boundary, averages={}) if round + 1 == self.without else boundary


@pytest.mark.parametrize("without", [1, 2])
def test_no_round_goes_on_from_what_a_client_trained_alone(without: int, model: Path, tmp_path: Path) -> None:
    heard: list[tuple[int, int, dict[str, Tensor]]] = []
    job = job_of(model, {"type": "local"}, aggregation={"secure": "off"}, cohort={"clients": 1})
    site = Site(random_rows(8, 0), trunk=lambda link, job, parts, wait: Forgetting(link, job, wait, heard, without))
    with serving(job, tmp_path, ["a"]) as running:
        with pytest.raises(SchemaError, match="no averages to go on from"):
            train_one(running, "a", site, tmp_path)
        running.running.stop()
    assert [round for round, _, _ in heard] == [0, 1][:without]


def _updates(running: Serving) -> list[str]:
    service = running.running.service
    return [] if service is None else [ticket.client for ticket in list(service.rounds.updates.values())]


def _wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def test_who_has_spent_all_stops_before_it_sends_anything_and_the_others_go_on(model: Path, tmp_path: Path) -> None:
    heard: list[tuple[int, int, dict[str, Tensor]]] = []
    job = job_of(
        model, {"type": "central"}, rounds=3, cohort={"clients": 3, "quorum": 2}, aggregation={"secure": "off"}
    )
    limit = epsilon([(1.0, 1)], DELTA) + 1e-6
    clients = sites(a={"trunk": partial(overhear, heard), "max_epsilon": limit})
    outcomes: dict[str, Outcome] = {}
    with serving(job, tmp_path, NAMES) as running:

        def run(name: str) -> None:
            outcomes[name] = train_one(running, name, clients[name], tmp_path)

        threads = {name: Background(name, partial(run, name)) for name in NAMES}
        with pytest.raises(Refused, match="the privacy of these rows is spent") as refused:
            threads["a"].join()
        for name in "bc":
            threads[name].join()
        running.service.join()
    assert refused.value.reason == "privacy_budget"
    assert [round for round, _, _ in heard] == [0]
    assert [entry.rounds for entry in read_entries(tmp_path / f"a{SUFFIX}")] == [1]
    for name in "bc":
        assert [event["epsilon"] for event in spent(outcomes[name])] == [
            epsilon([(1.0, rounds)], DELTA) for rounds in (1, 2, 3)
        ]


def test_who_can_pay_for_nothing_does_not_even_join(model: Path, tmp_path: Path) -> None:
    job = job_of(model, {"type": "local"}, cohort={"clients": 1})
    with serving(job, tmp_path, ["a"]) as running:
        with pytest.raises(Refused, match="one more round"):
            train_one(running, "a", Site(random_rows(8, 0), max_epsilon=0.1), tmp_path)
        assert running.running.service is not None
        assert running.running.service.rounds.started is False
    assert not (tmp_path / f"a{SUFFIX}").exists()


# From files


def run(running: Serving, settings: ClientSettings) -> Result:
    invitation = Invitation(
        id="0" * 32,
        client="a",
        brokers=[BrokerAt(address="tcp://localhost:1")],
        server="server",
        server_public_key=running.server.public.hex(),
        job=running.job.digest().hex(),
        expires_at=datetime.now(UTC),
    ).model_copy(update={"brokers": [BrokerAt.model_construct(address=CLIENTS)]})
    return run_client(settings, invitation, running.clients["a"], lambda event: None, running.context)


def test_a_ledger_lies_beside_the_rows_and_outlives_the_job(model: Path, tmp_path: Path) -> None:
    data = write_random_rows(tmp_path / "rows.jsonl", 8, 0)
    results = []
    for number, multiplier in enumerate((1.0, 4.0)):
        job = job_of(model, {"type": "central", "noise_multiplier": multiplier}, cohort={"clients": 1})
        with serving(job, tmp_path / str(number), ["a"]) as running:
            results.append(run(running, ClientSettings(data=data, out=tmp_path / f"out-{number}")))
    entries = read_entries(tmp_path / "rows.jsonl.privacy.json")
    assert [(e.data, e.noise_multiplier, e.rounds) for e in entries] == [
        (digest_of(data), 1.0, 2), (digest_of(data), 4.0, 2),
    ]  # fmt: skip
    assert results[1].privacy is not None
    assert results[1].privacy.epsilon == epsilon([(4.0, 2)], DELTA)
    assert results[1].privacy.total_epsilon == epsilon([(1.0, 2), (4.0, 2)], DELTA)
    document = json.loads((tmp_path / "out-1" / "flglm.json").read_text())
    assert document["privacy"]["total_epsilon"] == results[1].privacy.total_epsilon


def test_a_policy_holds_over_all_jobs_on_these_rows(model: Path, tmp_path: Path) -> None:
    data = write_random_rows(tmp_path / "rows.jsonl", 8, 0)
    policy = Policy(max_epsilon=epsilon([(1.0, 3)], DELTA) + 1e-6, max_delta=DELTA)
    for number in range(2):
        job = job_of(model, {"type": "central"}, cohort={"clients": 1}, training={"seed": number})
        settings = ClientSettings(data=data, out=tmp_path / f"out-{number}", policy=policy)
        with serving(job, tmp_path / str(number), ["a"]) as running:
            if number == 0:
                run(running, settings)
                continue
            with pytest.raises(Refused, match="more than max_epsilon"):
                run(running, settings)
    assert [entry.rounds for entry in read_entries(tmp_path / "rows.jsonl.privacy.json")] == [2, 1]


def test_a_ledger_that_is_lost_is_not_begun_anew(model: Path, tmp_path: Path) -> None:
    data = write_random_rows(tmp_path / "rows.jsonl", 8, 0)
    job = job_of(model, {"type": "central"}, rounds=3, cohort={"clients": 1})
    out = tmp_path / "out"
    with serving(job, tmp_path, ["a"]) as running:
        run(running, ClientSettings(data=data, out=out))
    (out / "flglm.json").unlink()
    ledger = tmp_path / "rows.jsonl.privacy.json"
    kept = ledger.read_bytes()
    for content, said in ((None, "knows nothing of this job, of which 3 rounds"), (kept[:-9], "not a privacy ledger")):
        ledger.unlink(missing_ok=True)
        if content is not None:
            ledger.write_bytes(content)
        with serving(job, tmp_path, ["a"]) as running, pytest.raises(LedgerError, match=said):
            run(running, ClientSettings(data=data, out=out))
        assert (ledger.read_bytes() if ledger.exists() else None) == content


@pytest.mark.slow
def test_replicas_go_on_from_the_same_noised_mean(model: Path, tmp_path: Path) -> None:
    """Two server processes, plain FedAvg: noise of one draw, for the mean over all clients of both."""
    job = job_of(
        model, {"type": "central", "clip_norm": 0.3}, split={"trunk": "client"}, cohort={"clients": 2}
    )  # fmt: skip
    named = [
        local_run.Site(name, write_random_rows(tmp_path / f"{name}.jsonl", 8, seed), tmp_path / f"{name}.jsonl")
        for seed, name in enumerate("ab")
    ]
    local_run.train_together(job, named, tmp_path / "run", replicas=2)
    states = [tmp_path / "run" / "server-state" / f"replica-{number}" for number in range(2)]
    for number in (1, 2):
        one, other = (flat(under("average/", state, number)) for state in states)
        assert torch.equal(one, other)
    results = tmp_path / "run" / "results"
    handed_in = [flat(under("handed_in/", results / name, 1)) for name in "ab"]
    start = flat(under("trained/", results / "a", 0))
    noise = flat(under("average/", states[0], 1)) - start - torch.stack(handed_in).mean(0)
    assert float(noise.std()) == pytest.approx(0.3 / 2, rel=0.1)
