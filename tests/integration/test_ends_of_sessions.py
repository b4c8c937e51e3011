"""The codes with which a server ends a session, or keeps a client out, as docs/protocol.md has them: on the wire."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.fidelity import ALL, Case, make_job, random_rows
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import Background, serving
from shared.errors import ConnectionFailed, Refused
from shared.job import Job, parse_job
from worker_client.batches import pack_rows
from worker_client.link import PASSING
from worker_client.remote_trunk import RemoteTrunk

WAIT_S = 30.0
ROOT = Path(__file__).parents[2]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(save_tiny_model("llama", tmp_path / "model"), Case(ALL, 2))


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def closed(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Which CLOSE the broker has sent, as it notes just after: to clients or servers, and its code."""
    fields: list[dict[str, Any]] = [
        record.fields  # type: ignore[attr-defined]
        for record in caplog.records
        if record.name == "broker.service" and record.getMessage() == "closed"
    ]
    return [(of["told"], of["code"]) for of in fields]


def test_a_member_of_a_round_that_lost_another_is_sent_back(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="broker.service")
    batch = pack_rows(random_rows(2, 0))
    with serving(job, tmp_path, ["a", "b"]) as running, running.link("a") as stays:
        with running.link("b") as leaves:
            joined = Background("b", lambda: RemoteTrunk(leaves, job, WAIT_S).join(2))
            trunk = RemoteTrunk(stays, job, WAIT_S)
            boundary = trunk.join(2)
            joined.join()
            assert boundary.round == 0
            hidden = torch.zeros(batch.tokens, 32)
            at = {"round": 0, "step": 0, "micro_batch": 0, "target_tokens": batch.target_tokens}
            waits = trunk.send_forward(hidden, batch, **at, wants_gradient=False)
        with pytest.raises(ConnectionFailed, match="begins anew"):
            trunk.hidden(waits)
        until(lambda: ("client", "round_undone") in closed(caplog))
        with running.link("a") as again, running.link("b") as back:
            other = Background("b", lambda: RemoteTrunk(back, job, WAIT_S).join(2))
            assert RemoteTrunk(again, job, WAIT_S).join(2).round == 0
            other.join()


def test_an_older_session_of_a_client_ends_when_it_joins_anew(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="broker.service")
    with serving(job, tmp_path, ["a", "b"]) as running, running.link("a") as old:
        waiting = Background("old", lambda: RemoteTrunk(old, job, WAIT_S).join(1))
        service = running.running.service
        assert service is not None
        until(lambda: len(service.rounds.lobby) == 1)
        with running.link("a") as new, running.link("b") as other:
            joined = Background("new", lambda: RemoteTrunk(new, job, WAIT_S).join(1))
            with pytest.raises(Refused, match="joined with another session") as ended:
                waiting.join()
            assert ended.value.reason == "superseded"
            until(lambda: ("client", "superseded") in closed(caplog))
            assert RemoteTrunk(other, job, WAIT_S).join(1).members == 2
            joined.join()


def test_a_server_that_stops_says_so_to_every_client(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="broker.service")
    with serving(job, tmp_path, ["a", "b"]) as running, running.link("a") as one, running.link("b") as two:
        running.running.stop()
        running.service.join()
        until(lambda: None not in (one.failure, two.failure))
        assert isinstance(one.failure, ConnectionFailed)  # and so another session is tried
        until(lambda: closed(caplog).count(("client", "server_stopping")) == 2)


def test_with_adapters_of_their_own_there_are_as_many_places_as_clients(job: Job, tmp_path: Path) -> None:
    values = job.model_dump(mode="json")
    own = values | {
        "method": {"type": "lora", "r": 2},
        "cohort": values["cohort"] | {"adapters": "per_client", "clients": 2},
    }
    job = parse_job(own, "job")
    with serving(job, tmp_path, ["a", "b", "c"]) as running, running.link("a") as one, running.link("c") as late:
        with running.link("b") as two:
            joined = Background("a", lambda: RemoteTrunk(one, job, WAIT_S).join(1))
            RemoteTrunk(two, job, WAIT_S).join(1)
            joined.join()
            with pytest.raises(Refused, match=r"all 2 places \(cohort.clients\) are taken") as refused:
                RemoteTrunk(late, job, WAIT_S).join(1)
            assert refused.value.reason == "no_place"
        service = running.running.service
        assert service is not None
        until(lambda: len(service.rounds.active) + len(service.rounds.lobby) < 2)
        with running.link("a") as again:  # whose round was undone
            other = Background("a", lambda: RemoteTrunk(again, job, WAIT_S).join(1))
            assert RemoteTrunk(late, job, WAIT_S).join(1).members == 2
            other.join()


def test_the_protocol_names_them_and_clients_know_which_pass() -> None:
    protocol = (ROOT / "docs" / "protocol.md").read_text()
    for code in ("round_undone", "superseded", "server_stopping", "no_place"):
        assert f"`{code}`" in protocol
    assert {"round_undone", "server_stopping"} <= set(PASSING)
    assert not {"superseded", "no_place"} & set(PASSING)
