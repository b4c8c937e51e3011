"""Updates masked in a ring in whole runs: as SecAgg's and unmasked ones, in one request a round, and what is lost."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from test_masked_runs import (
    CLOSE,
    KINDS,
    NAMES,
    Killed,
    Liar,
    chi_square,
    come_back,
    coming_back,
    furthest,
    job_of,
    killed,
    model,
    one_thread,
    results,
    short,
    sites,
)

from launcher.in_process import Outcome, serving, train_in_process, train_one
from shared.errors import ConnectionFailed, Refused
from shared.job import Job
from shared.payload.messages import Mask
from shared.secure_aggregation.messages import RingInput, RingKey
from worker_client.head_tail import HeadTail
from worker_client.link import Link
from worker_client.remote_trunk import RemoteTrunk
from worker_server.progress import BOUND
from worker_server.ring import RingSum
from worker_server.rounds import Rounds

__all__ = ["model", "one_thread"]
FOUR = (*NAMES, "d")
FIVE = (*FOUR, "e")


def in_a(secure: str, **settings: Any) -> dict[str, Any]:
    """`settings` of a job with `aggregation.secure`."""
    return settings | {"aggregation": {**settings.get("aggregation", {}), "secure": secure}}


class Inputs:
    """What arrives at the server in place of updates: how many messages of a kind by round, and all words."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kinds: Counter[tuple[int, str]] = Counter()
        self.words: list[tuple[str, int, bytes]] = []
        take = RingSum.take

        def seen(sum_: RingSum, client: str, message: Mask, frames: Any) -> None:
            frames = list(frames)
            self.kinds[message.round, message.body.type] += 1
            self.words += [(client, message.round, bytes(frame)) for frame in frames]
            take(sum_, client, message, frames)

        def refuse(*_: Any) -> None:
            raise AssertionError("an update came in the clear")

        monkeypatch.setattr(RingSum, "take", seen)
        monkeypatch.setattr(Rounds, "update", refuse)


def steps(outcome: Outcome) -> list[int]:
    """What it trained, each step of the job by its number."""
    return [event["step"] for event in outcome.events if event["event"] == "step"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "secagg+"])
def test_it_ends_as_secagg_does(kind: str, model: Path, tmp_path: Path) -> None:
    """To the bit: the sums in fixed point are the same. tests/integration/test_masked_runs.py has those unmasked."""
    job = job_of(model, **in_a("ring", **KINDS[kind]))
    assert job.secure == "ring"
    ring = results(tmp_path / "ring", train_in_process(job, sites(), tmp_path / "ring"))
    secagg = job_of(model, **in_a("secagg", **KINDS[kind]))
    assert furthest(ring, results(tmp_path / "secagg", train_in_process(secagg, sites(), tmp_path / "secagg"))) == 0.0


def test_of_five_clients_it_ends_as_unmasked(model: Path, tmp_path: Path) -> None:
    job = job_of(model, clients=5, **in_a("ring"))
    ring = results(tmp_path / "ring", train_in_process(job, sites(FIVE), tmp_path / "ring"))
    off = job_of(model, clients=5, **in_a("off"))
    clear = results(tmp_path / "off", train_in_process(off, sites(FIVE), tmp_path / "off"))
    assert 0.0 < furthest(ring, clear) < CLOSE


def test_keys_once_then_one_request_a_round_of_uniform_words(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for folder in ("one", "two"):
        with monkeypatch.context() as patched:
            came = Inputs(patched)
            outcomes = train_in_process(job_of(model, **in_a("ring")), sites(), tmp_path / folder)
        assert came.kinds == {(0, "ring_key"): 3, (0, "ring_input"): 3, (1, "ring_input"): 3}
        runs.append(
            ({(client, round): data for client, round, data in came.words}, results(tmp_path / folder, outcomes))
        )
    (first, trained), (second, again) = runs
    assert furthest(trained, again) == 0.0  # the very same updates
    for key, data in first.items():
        assert chi_square(data) < 255 + 6 * 22.6
        assert chi_square(bytes(x ^ y for x, y in zip(data, second[key], strict=True))) < 255 + 6 * 22.6


@dataclass(frozen=True)
class Mortal(RemoteTrunk):
    """Dies when it would send `at` in round `when`, once."""

    at: type = RingInput
    when: int = 1
    dead: threading.Event = field(default_factory=threading.Event)

    def mask(self, round: int, body: Any, *arguments: Any, **named: Any) -> Any:
        if (round, type(body)) == (self.when, self.at) and not self.dead.is_set():
            self.dead.set()
            raise Killed
        return super().mask(round, body, *arguments, **named)


def mortal(at: type, when: int) -> Callable[[Link, Job, HeadTail, float], RemoteTrunk]:
    dead = threading.Event()
    return lambda link, job, parts, timeout_s: Mortal(link, job, timeout_s, at, when, dead)


@pytest.mark.parametrize(("at", "when"), [(RingKey, 0), (RingInput, 0), (RingInput, 1)])
def test_a_client_killed_that_comes_back_changes_nothing(at: type, when: int, model: Path, tmp_path: Path) -> None:
    job = job_of(model, count=3, **in_a("ring"))
    calm = results(tmp_path / "calm", train_in_process(job, sites(), tmp_path / "calm"))
    outcomes: dict[str, Outcome] = {}
    clients = sites(c=mortal(at, when))
    folder = tmp_path / "cut"
    others = {name: site for name, site in clients.items() if name != "c"}
    with serving(job, folder, NAMES) as running, coming_back(running, others, folder, outcomes):
        with pytest.raises(Killed):
            train_one(running, "c", clients["c"], folder)
        come_back(running, "c", clients["c"], folder, outcomes)
    assert furthest(results(folder, outcomes), calm) == 0.0


@pytest.mark.parametrize(("at", "when"), [(RingKey, 0), (RingInput, 0), (RingInput, 1)])
def test_with_a_smaller_quorum_the_others_go_on_without_training_again(
    at: type, when: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came = Inputs(monkeypatch)
    job = job_of(model, clients=4, count=3, **in_a("ring", cohort={"quorum": 3}))
    clients = sites(FOUR, d=mortal(at, when))
    outcomes: dict[str, Outcome] = {}
    with (
        serving(job, tmp_path, FOUR, farewell_s=1.0) as running,
        coming_back(running, {name: clients[name] for name in NAMES}, tmp_path, outcomes),
        pytest.raises(Killed),
    ):
        train_one(running, "d", clients["d"], tmp_path)
    for outcome in outcomes.values():
        assert steps(outcome) == list(range(6))
        members = [e["members"] for e in outcome.events if e["event"] == "round"]
        assert members == [4 if round <= when else 3 for round in range(3)]
        assert not {"resumed", "update_refused"} & {event["event"] for event in outcome.events}
    # Where its key was in the ring the sum is done again; of other words, though the update is the same.
    again = at is RingInput
    assert [came.kinds[round, "ring_input"] for round in range(3)] == [
        (4 if round < when else 6 if again and round == when else 3) for round in range(3)
    ]
    assert [came.kinds[round, "ring_key"] for round in range(3)] == [4 if again else 3, 0, 0]
    same = [data for client, round, data in came.words if (client, round) == ("a", when)]
    if again:
        first, second = same
        assert chi_square(bytes(x ^ y for x, y in zip(first, second, strict=True))) < 255 + 6 * 22.6
    # All end with the same.
    trained = [outcomes[name].parts.parameters for name in NAMES]
    assert all(bool((trained[0][name] == other[name]).all()) for other in trained[1:] for name in other)


def test_a_client_that_comes_back_makes_the_ring_anew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed before its input of the second round; the others ended that one without it."""
    came = Inputs(monkeypatch)
    job = job_of(model, clients=4, count=5, **in_a("ring", cohort={"quorum": 3}))
    clients = sites(FOUR, d=mortal(RingInput, 1))
    outcomes: dict[str, Outcome] = {}
    with (
        serving(job, tmp_path, FOUR) as running,
        coming_back(running, {name: clients[name] for name in NAMES}, tmp_path, outcomes),
    ):
        with pytest.raises(Killed):
            train_one(running, "d", clients["d"], tmp_path)
        come_back(running, "d", clients["d"], tmp_path, outcomes)
    made = [round for round in range(5) if came.kinds[round, "ring_key"]]
    back = next(event["round"] for event in outcomes["d"].events if event["event"] == "round")
    assert made == [0, back]
    assert back >= 2
    assert came.kinds[back, "ring_key"] == 4
    trained = [outcome.parts.parameters for outcome in outcomes.values()]
    assert all(bool((trained[0][name] == other[name]).all()) for other in trained[1:] for name in other)


def test_a_server_killed_after_it_saw_the_sum_ends_bit_equal(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it wrote it down: the round is done again among the same, in another ring."""
    job = job_of(model, count=3, **in_a("ring"))
    calm = results(tmp_path / "calm", train_in_process(job, sites(), tmp_path / "calm"))
    folder = tmp_path / "cut"
    killed(job, folder, sites(), monkeypatch)
    assert (folder / "server-state" / BOUND).exists()
    assert furthest(results(folder, train_in_process(job, sites(), folder)), calm) == 0.0


def garbage(body: Any, frames: Any) -> tuple[Any, Any]:
    """Of a sum that is not under way."""
    if isinstance(body, RingInput):
        body = body.model_copy(update={"sequence": 9})
    return body, frames


def out_of_turn(body: Any, frames: Any) -> tuple[Any, Any]:
    if isinstance(body, RingKey):
        return RingInput(sequence=0, words=8), [bytes(64)]
    return body, frames


@pytest.mark.parametrize(
    ("twist", "code", "sent"), [(short, "tensor", 2), (garbage, "phase", 2), (out_of_turn, "phase", 1)]
)
def test_a_client_that_breaks_the_rules_is_refused_and_the_others_go_on(
    twist: Any, code: str, sent: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came = Inputs(monkeypatch)
    job = job_of(model, clients=4, **in_a("ring", cohort={"quorum": 3}))
    clients = sites(FOUR, d=lambda link, job, parts, timeout_s: Liar(link, job, timeout_s, twist))
    outcomes: dict[str, Outcome] = {}
    with (
        serving(job, tmp_path, FOUR, farewell_s=1.0) as running,
        coming_back(running, {name: clients[name] for name in NAMES}, tmp_path, outcomes),
    ):
        with pytest.raises(Refused) as caught:
            train_one(running, "d", clients["d"], tmp_path)
        assert caught.value.reason == code
        service = running.running.service
        assert service is not None
        assert service.counters[f"refused_{code}"] == 1
    for outcome in outcomes.values():
        assert steps(outcome) == list(range(4))
    assert sum(client == "a" and round == 0 for client, round, _ in came.words) == sent


@dataclass(frozen=True)
class Slow(RemoteTrunk):
    """Its input of the second round waits until the others were asked for theirs again."""

    asked: Callable[[], bool] = bool

    def mask(self, round: int, body: Any, *arguments: Any, **named: Any) -> Any:
        deadline = time.monotonic() + 60
        while round == 1 and not self.asked() and time.monotonic() < deadline:
            threading.Event().wait(0.05)
        return super().mask(round, body, *arguments, **named)


def test_what_comes_of_one_that_is_late_is_not_opened(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its session is over when the others are asked again: with both sums its update would be their difference."""
    came = Inputs(monkeypatch)
    job = job_of(model, clients=4, count=3, **in_a("ring", cohort={"quorum": 3, "deadline_s": 4.0}))

    def trunk(link: Link, job: Job, parts: HeadTail, timeout_s: float) -> RemoteTrunk:
        return Slow(link, job, timeout_s, lambda: came.kinds[1, "ring_input"] > 3)

    clients = sites(FOUR, d=trunk)
    outcomes: dict[str, Outcome] = {}
    with (
        serving(job, tmp_path, FOUR, farewell_s=1.0) as running,
        coming_back(running, {name: clients[name] for name in NAMES}, tmp_path, outcomes),
        pytest.raises(ConnectionFailed, match="goes on without this client"),
    ):
        train_one(running, "d", clients["d"], tmp_path)
    assert [client for client, round, _ in came.words if round == 1].count("d") == 0
    assert came.kinds[1, "ring_input"] == 6
    for outcome in outcomes.values():
        assert steps(outcome) == list(range(6))
