"""Each check of `flglm check` with its failure really provoked; the good case beside a running broker and server."""

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from benchmarks.fidelity import ALL, Case, make_job, write_random_rows
from benchmarks.joint_run import train
from benchmarks.tiny_models import save_tiny_model, save_word_tokenizer
from broker.guard import Guard
from broker.service import Broker
from broker.settings import BrokerSettings
from launcher.in_process import Background, Site, serving, train_one
from launcher.main import main
from launcher.preflight.checks import Check, Checklist, Status, one_line
from launcher.preflight.files import check_clock, check_expiry
from launcher.preflight.models import (
    client_need,
    count,
    evaluation_traffic,
    residual_values,
    round_traffic,
    server_need,
)
from launcher.preflight.network import check_broker, check_free, check_metrics, check_name, probing
from launcher.preflight.resources import Need, available_memory, check_checkpoints, check_disk, check_memory
from launcher.preflight.server import check_device
from shared import state_files
from shared.allow_list import AllowList, revoke
from shared.group_keys import create_group_key, fingerprint
from shared.identity import generate_identity, load_identity
from shared.invitations import load_invitation
from shared.job import Job, parse_job
from shared.model.checkpoint import Checkpoint
from shared.model.plan import SplitPlan
from shared.payload.tensors import encode
from shared.secure_aggregation.group_key import GroupKey
from shared.wire.curve import Door
from worker_client.data import Row
from worker_client.head_tail import load_client_parts
from worker_server.server import Server
from worker_server.settings import ServerSettings

ANYWHERE = "tcp://127.0.0.1:*"
WAIT_S = 20.0
NOW = datetime.now(UTC)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@dataclass
class House:
    """A folder with everybody's files, a guarded broker, and a server, which is started on demand."""

    folder: Path
    capture: pytest.CaptureFixture[str]
    context: "zmq.Context[zmq.Socket[bytes]]"
    broker: Broker
    job: Job
    server: Server | None = None

    def check(self, role: str, *words: str, expect: int | None = None) -> dict[str, dict[str, str]]:
        """The rows by name; `expect`: the exit code, by default the one that goes with them."""
        self.capture.readouterr()
        code = run("check", role, *DEFAULTS[role], *self.addresses(role), *words, "--format", "json")
        document = json.loads(self.capture.readouterr().out)
        rows = {row["name"]: row for row in document["data"]["checks"]}
        failed = any(row["status"] == "fail" for row in rows.values())
        assert (code, document["status"]) == ((4, "error") if failed else (0, "ok"))
        assert document.get("error_code") == ("check_failed" if failed else None)
        assert expect in (None, code)
        for row in rows.values():
            assert bool(row["mend"]) == (row["status"] != "ok"), row
            assert "\n" not in row["found"] + row["mend"]
        return rows

    def addresses(self, role: str) -> list[str]:
        return ["--broker", self.broker.backend, "--broker-card", "keys/broker.card"] if role == "server" else []

    def invite(self, *words: str, address: str = "", job: str = "job.yaml") -> None:
        """Write a.invite anew."""
        Path("a.invite").unlink(missing_ok=True)
        arguments = ["--job", job, "--server", "keys/gpu.card", "--broker", address or self.broker.frontend]
        assert run("invite", "a", *arguments, "--broker-card", "keys/broker.card", *words) == 0


DEFAULTS = {
    "broker": ["--key", "keys/broker.key"],
    "server": ["--job", "job.yaml", "--key", "keys/gpu.key", "--connect-timeout", "2"],
    "client": [
        *("--invite", "a.invite", "--key", "keys/a.key", "--data", "rows.jsonl", "--out", "out"),
        *("--connect-timeout", "1"),
    ],
}


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[House]:
    monkeypatch.chdir(tmp_path)
    save_word_tokenizer(save_tiny_model("llama", tmp_path / "model"))
    job = make_job(Path("model"), Case(ALL, 1))
    Path("job.yaml").write_text(json.dumps(job.model_dump(mode="json")))
    write_random_rows(tmp_path / "rows.jsonl", 10, 0)
    for name in ("broker", "gpu", "a", "stranger"):
        assert run("keys", "new", name) == 0
    for name, door in (("gpu", "servers"), ("a", "clients")):
        assert run("admit", f"keys/{name}.card", "--clients", door) == 0
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    guard = Guard(load_identity(Path("keys/broker.key")).link, Path("clients"), Path("servers"))
    with Broker(BrokerSettings(frontend=ANYWHERE, backend=ANYWHERE), context, guard) as broker:
        routing = Background("broker", broker.run)
        made = House(tmp_path, capsys, context, broker, job)
        made.invite()
        yield made
        broker.stop()
        routing.join()
    context.destroy(0)


@pytest.fixture
def serving_house(house: House) -> Iterator[House]:
    """The same with its server at the broker."""
    identity = load_identity(Path("keys/gpu.key"))
    door = Door(house.broker.backend, load_identity(Path("keys/broker.key")).link.public)
    settings = ServerSettings(brokers=(door,), state=Path("running-state"))
    house.server = Server(settings, house.job, identity, AllowList(Path("clients")).names, house.context)
    service = Background("server", house.server.run)
    deadline = time.monotonic() + WAIT_S
    while not house.broker.router.servers and time.monotonic() < deadline:
        time.sleep(0.02)
    yield house
    house.server.stop()
    service.join()


# All is well


def test_where_all_is_well_every_row_says_so_and_nothing_changes(serving_house: House) -> None:
    server = serving_house.server
    assert server is not None
    before = snapshot(serving_house.folder)
    client = serving_house.check("client", "--digest", expect=0)
    assert {row["status"] for name, row in client.items() if name != "updates"} == {"ok"}
    assert list(client) == [
        "key", "invitation", "clock", f"broker {serving_house.broker.frontend[6:]}", "server", "job", "updates",
        "model", "same model", "digest", "rows rows.jsonl", "split", "memory", "traffic", "disk",
    ]  # fmt: skip
    assert client["updates"]["status"] == "warn"  # of one client alone there is no sum
    assert "the server sees every client's update" in client["updates"]["found"]
    assert client["rows rows.jsonl"]["found"] == "10 usable"
    assert server.service is not None
    peer = next(iter(serving_house.broker.router.servers.values()))[0]

    checked = serving_house.check("server", "--invite", "a.invite", expect=0)
    assert {row["status"] for name, row in checked.items() if name != "updates"} == {"ok"}
    assert checked["updates"] == client["updates"]
    # The running server keeps its place at the broker, and no client is there for it.
    assert next(iter(serving_house.broker.router.servers.values()))[0] == peer
    assert server.service.rounds.stage == "waiting"
    deadline = time.monotonic() + WAIT_S
    while list(server.service.sessions) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not list(server.service.sessions)
    assert snapshot(serving_house.folder) == before


def test_a_visitor_does_not_end_a_finished_servers_wait_for_its_clients(tmp_path: Path) -> None:
    job = make_job(save_tiny_model("llama", tmp_path / "model"), Case(("trunk",), 1))
    job = job.model_copy(update={"rounds": job.rounds.model_copy(update={"count": 1, "local_steps": 1})})
    site = Site([Row((2, 3, 4), (True,) * 3)] * 4)
    with serving(job, tmp_path, ["a"]) as running:
        train_one(running, "a", site, tmp_path)
        running.service.join()
    with serving(job, tmp_path, ["a", "b"]) as again:
        with again.link("b"):
            pass
        service = again.running.service
        assert service is not None
        service.owed = {"b"}
        time.sleep(0.6)
        with again.link("b"):
            pass
        time.sleep(0.6)
        assert again.service.thread.is_alive()
        assert service.owed == {"b"}


def test_text_is_a_table_that_says_what_to_type(house: House) -> None:
    Path("keys/a.key").chmod(0o644)
    house.capture.readouterr()
    assert run("check", "client", *DEFAULTS["client"]) == 4
    captured = house.capture.readouterr()
    lines = [line.rstrip() for line in captured.out.splitlines()]
    assert any(line.startswith("fail  key ") for line in lines)
    assert any(line.strip() == "-> chmod 600 keys/a.key" for line in lines)
    assert "\x1b" not in captured.out
    assert captured.err.startswith("flglm: 1 of ")


def test_json_lines_are_the_rows_as_they_come_and_then_the_result(house: House) -> None:
    house.capture.readouterr()
    assert run("check", "broker", *DEFAULTS["broker"], "--clients-address", house.broker.frontend,
               "--servers-address", ANYWHERE, "--format", "jsonl") == 4  # fmt: skip
    *events, last = [json.loads(line) for line in house.capture.readouterr().out.splitlines()]
    assert [{k: v for k, v in event.items() if k != "event"} for event in events] == last["data"]["checks"]
    assert {event["event"] for event in events} == {"check"}


# The broker


def test_a_broker_whose_doors_are_free_may_start(house: House) -> None:
    rows = house.check("broker", "--clients-address", ANYWHERE, "--servers-address", ANYWHERE, expect=0)
    assert rows["clients"]["found"] == "clients admits 1: a"


def test_a_broker_with_everything_wrong_is_told_all_of_it(house: House) -> None:
    Path("keys/broker.key").write_text("{}")
    Path("servers/gpu.card").write_text("garbage")
    revoke("a", Path("clients"))
    rows = house.check("broker", "--clients-address", house.broker.frontend, "--servers-address", "udp://x:1")
    assert {name: row["status"] for name, row in rows.items()} == {
        "key": "fail", "clients": "warn", "servers": "fail", "clock": "ok",
        "clients address": "fail", "servers address": "fail",
    }  # fmt: skip
    assert "Address already in use" in rows["clients address"]["found"]
    assert "--clients-address" in rows["clients address"]["mend"]


def test_a_plain_broker_stays_on_this_machine(house: House) -> None:
    assert run("check", "broker", "--plain", "--clients-address", ANYWHERE, "--servers-address", ANYWHERE) == 0
    assert run("check", "broker", "--plain", "--clients-address", "tcp://*:*", "--servers-address", ANYWHERE) == 4
    assert run("check", "broker", "--clients-address", ANYWHERE, "--servers-address", ANYWHERE) == 4


def test_addresses_to_listen_on(tmp_path: Path) -> None:
    def status(*addresses: str) -> list[str]:
        return [row.status for row in check_free({f"door {i}": address for i, address in enumerate(addresses)})]

    assert status("tcp://lo:*", "tcp://*:*") == ["ok", "ok"]
    assert status("tcp://203.0.113.1:*", "tcp://nonsense:5", "tcp://*:70000", "tcp://*:x") == ["fail"] * 4
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert status(f"tcp://127.0.0.1:{port}", f"tcp://127.0.0.1:{port}") == ["ok", "fail"]
    path = tmp_path / "s"
    assert status(f"ipc://{path}", f"ipc://{tmp_path}/none/s") == ["ok", "fail"]
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        assert status(f"ipc://{path}") == ["ok"]
        listening.listen()
        assert status(f"ipc://{path}") == ["fail"]
    assert path.exists()


def test_an_address_to_be_watched_at() -> None:
    assert check_metrics("localhost:0").status is Status.OK
    assert [check_metrics(address).status for address in ("nonsense", "no-such-host.invalid:1")] == ["fail", "fail"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        row = check_metrics(f"127.0.0.1:{taken.getsockname()[1]}")
    assert (row.status, "--metrics-address" in row.mend) == (Status.FAIL, True)


# Keys, cards, clock


@pytest.mark.parametrize(
    ("change", "mend"),
    [
        (lambda key: key.chmod(0o640), "chmod 600 keys/a.key"),
        (lambda key: key.unlink(), "flglm keys new"),
        (lambda key: key.write_text("{"), "flglm keys new"),
    ],
)
def test_a_key_that_cannot_be_used(house: House, change: Any, mend: str) -> None:
    change(Path("keys/a.key"))
    rows = house.check("client", expect=4)
    assert rows["key"]["status"] == "fail"
    assert mend in rows["key"]["mend"]
    assert not any(name.startswith("broker") for name in rows)


def test_a_clock_before_the_newest_file_is_slow(tmp_path: Path) -> None:
    file = tmp_path / "a.invite"
    file.write_text("")
    assert check_clock(NOW + timedelta(days=400), [file, tmp_path / "absent"]).status is Status.OK
    slow = check_clock(NOW - timedelta(days=400), [file])
    assert slow.status is Status.WARN
    later = (NOW + timedelta(days=2)).timestamp()
    os.utime(file, (later, later))
    assert str(file) in check_clock(NOW + timedelta(hours=1), [file]).found


# The client's invitation and its way


def test_an_invitation_expires_but_the_rest_is_looked_at(house: House) -> None:
    document = json.loads(Path("a.invite").read_text()) | {"expires_at": "2020-01-01T00:00:00Z"}
    Path("a.invite").write_text(json.dumps(document))
    rows = house.check("client", expect=4)
    assert rows["invitation"]["status"] == "fail"
    assert "2020-01-01" in rows["invitation"]["found"]
    assert rows[f"broker {house.broker.frontend[6:]}"]["status"] == "ok"
    Path("a.invite").write_text("{}")
    assert house.check("client", expect=4)["invitation"]["status"] == "fail"


def test_an_invitation_that_ends_soon_is_worth_a_look(house: House) -> None:
    invitation = load_invitation(Path("a.invite"), NOW)
    statuses = [
        check_expiry(Path("i"), invitation, invitation.expires_at - timedelta(hours=hours)).status
        for hours in (0, 1, 100)
    ]
    assert statuses == [Status.FAIL, Status.WARN, Status.OK]


def test_a_site_whose_server_is_not_there_yet_may_start_and_is_told_what_was_not_looked_at(house: House) -> None:
    rows = house.check("client", expect=0)
    assert rows["server"]["status"] == "warn"
    assert rows["job"]["status"] == "warn"
    assert rows["rows rows.jsonl"]["found"] == "10 rows, not tokenized yet"
    known = house.check("client", "--job", "job.yaml", expect=0)
    assert known["server"]["status"] == "warn"
    assert known["job file"]["status"] == known["rows rows.jsonl"]["status"] == known["memory"]["status"] == "ok"


def test_a_broker_that_does_not_know_the_key(house: House) -> None:
    rows = house.check("client", "--key", "keys/stranger.key", expect=4)
    name = f"broker {house.broker.frontend[6:]}"
    assert "does not admit this key" in rows[name]["found"]
    assert "flglm admit" in rows[name]["mend"]
    assert rows["owner"]["status"] == "warn"
    revoke("a", Path("clients"))
    assert "does not admit this key" in house.check("client", expect=4)[name]["found"]


def test_a_wrong_card_of_the_broker_is_told_from_a_broker_that_is_away(house: House) -> None:
    Path("a.invite").unlink()
    arguments = ["--job", "job.yaml", "--server", "keys/gpu.card", "--broker", house.broker.frontend]
    assert run("invite", "a", *arguments, "--broker-card", "keys/stranger.card") == 0
    rows = house.check("client", expect=4)
    assert "not the broker of that card" in rows[f"broker {house.broker.frontend[6:]}"]["found"]
    house.invite(address="tcp://127.0.0.1:9")
    assert "Connection refused" in house.check("client", expect=4)["broker 127.0.0.1:9"]["found"]


def test_a_name_that_does_not_resolve(house: House) -> None:
    house.invite(address="tcp://no-such-host.invalid:5555")
    rows = house.check("client", expect=4)
    assert rows["name no-such-host.invalid"]["status"] == "fail"
    assert not any(name.startswith("broker") for name in rows)
    assert check_name("tcp://127.0.0.1:1") is None
    local = check_name("tcp://localhost:1")
    assert local is not None
    assert local.status is Status.OK


def test_plain_doors_and_doors_that_are_mixed_up() -> None:
    with probing() as context, Broker(BrokerSettings(frontend=ANYWHERE, backend=ANYWHERE), context) as broker:
        routing = Background("broker", broker.run)
        keys = generate_identity("a").link

        def look(address: str, at: str, key: bytes | None = None) -> str:
            return check_broker(context, Door(address, key), keys, at=at, timeout_s=2).found

        assert look(broker.frontend, "clients") == look(broker.backend, "servers") == "answers, plain"
        assert "address for servers, not for clients" in look(broker.backend, "clients")
        assert "another security protocol" in look(broker.frontend, "clients", keys.public)
        assert broker.router.servers == {}
        broker.stop()
        routing.join()


def test_a_broker_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.routing.PROTOCOL_VERSION", 2)
    with probing() as context, Broker(BrokerSettings(frontend=ANYWHERE, backend=ANYWHERE), context) as broker:
        routing = Background("broker", broker.run)
        found = check_broker(context, Door(broker.frontend), generate_identity("a").link, at="clients", timeout_s=2)
        broker.stop()
        routing.join()
    assert (found.status, "same version" in found.mend) == (Status.FAIL, True)


# What the server says


def test_a_server_that_does_not_admit_the_key_or_runs_another_job(serving_house: House) -> None:
    server = serving_house.server
    assert server is not None
    assert server.service is not None
    sessions = server.service.sessions
    admitted, sessions.admitted = sessions.admitted, lambda: {}
    rows = serving_house.check("client", expect=4)
    assert "flglm admit" in rows["server"]["mend"]
    assert "keys/a.card" in rows["server"]["mend"]
    sessions.admitted = admitted

    other = serving_house.job.model_copy(update={"name": "other"})
    Path("other.yaml").write_text(json.dumps(other.model_dump(mode="json")))
    serving_house.invite(job="other.yaml")
    rows = serving_house.check("client", "--job", "job.yaml", expect=4)
    assert "another job" in rows["server"]["found"]
    assert rows["job file"]["status"] == "fail"


def test_a_policy_that_is_broken_refuses_the_server_or_the_job(serving_house: House) -> None:
    def policy(text: str) -> dict[str, dict[str, str]]:
        Path("policy.yaml").write_text(text)
        return serving_house.check("client", "--policy", "policy.yaml")

    assert policy("min_head_blocks: 1\n")["policy and job"]["status"] == "ok"
    assert "min_head_blocks=2" in policy("min_head_blocks: 2\n")["policy and job"]["found"]
    assert "did you mean" in policy("min_head_block: 2\n")["policy"]["found"]
    refused = policy(f"servers: ['{'0' * 64}']\n")
    assert refused["policy"]["status"] == "fail"
    assert "server" not in refused  # not greeted at all


def test_another_model_and_rows_that_do_not_load(serving_house: House) -> None:
    save_word_tokenizer(save_tiny_model("llama", serving_house.folder / "other", seed=1))
    Path("rows.jsonl").write_text('{"text": "w5"}\nnot json\n')
    rows = serving_house.check("client", "--model", "other", expect=4)
    assert "the weights differ" in rows["same model"]["found"]
    assert "rows.jsonl:2: not JSON" in rows["rows rows.jsonl"]["found"]
    rows = serving_house.check("client", "--model", "./absent", "--data", "none.jsonl", expect=4)
    assert rows["model"]["status"] == "fail"
    assert "No such file" in rows["rows none.jsonl"]["found"]
    # Never asked for over the network.
    assert serving_house.check("client", "--model", "nobody/nothing")["model"]["status"] == "warn"
    Path("rows.jsonl").write_text('{"text": "%s"}\n' % ("w5 " * 100) + '{"text": "w5 w6"}\n')
    cut = serving_house.check("client", "--validation", "rows.jsonl", expect=0)["rows rows.jsonl"]
    assert (cut["status"], cut["found"]) == ("warn", "2 usable, 1 cut at 64 tokens")


# The server


def test_a_server_with_everything_wrong_is_told_all_of_it(house: House) -> None:
    other = house.job.model_copy(update={"name": "other", "cohort": house.job.cohort.model_copy(update={"clients": 2})})
    Path("other.yaml").write_text(json.dumps(other.model_dump(mode="json")))
    state_files.save(Path("server-state"), 0, {}, {"job": "0" * 64})
    rows = house.check(
        "server", "--job", "other.yaml", "--key", "keys/stranger.key", "--device", "cuda:99", "--invite", "a.invite"
    )
    statuses = {name: row["status"] for name, row in rows.items()}
    broker = f"broker {house.broker.backend[6:]}"
    assert {name for name, status in statuses.items() if status == "fail"} == {
        "invitation a.invite", broker, "device", "resume",
    }  # fmt: skip
    assert statuses["clients"] == "warn"
    assert "--clients servers" in rows[broker]["mend"]
    rows = house.check("server", "--job", "other.yaml", "--invite", "a.invite", expect=4)
    assert rows["invitation a.invite"]["found"].startswith("names job ")


def test_a_server_at_the_clients_door_or_without_a_card(house: House) -> None:
    Path("clients/gpu.card").write_text(Path("servers/gpu.card").read_text())
    rows = house.check("server", "--broker", house.broker.frontend, expect=4)
    assert "address for clients, not for servers" in rows[f"broker {house.broker.frontend[6:]}"]["found"]
    words = ["check", "server", *DEFAULTS["server"], "--format", "json"]
    house.capture.readouterr()
    assert run(*words) == 4
    assert "--broker needs --broker-card" in house.capture.readouterr().out


def test_a_job_and_a_model_that_do_not_go_together(house: House) -> None:
    def rows(**changes: Any) -> dict[str, dict[str, str]]:
        Path("job.yaml").write_text(json.dumps(house.job.model_dump(mode="json") | changes))
        return house.check("server", expect=4)

    assert "leave no trunk" in rows(split={"head_blocks": 2, "tail_blocks": 2})["split"]["found"]
    assert rows(method={"type": "lora", "target_modules": ["none"]})["method"]["status"] == "fail"
    assert "unknown setting" in rows(metod={})["job"]["found"]
    Path("model/model.safetensors").write_bytes(b"\xff" * 64)
    assert "corrupt or unreadable" in rows()["model"]["found"]


# Room


def test_disk_and_memory_are_held_against_the_estimate(tmp_path: Path) -> None:
    assert check_disk("--out", tmp_path / "new", 10, lambda _: 10).status is Status.OK
    little = check_disk("--out", tmp_path / "new", 11, lambda _: 10)
    assert (little.status, "--out" in little.mend) == (Status.FAIL, True)
    assert [check_memory(10, lambda room=room: room).status for room in (9, 10, 15)] == ["fail", "warn", "ok"]  # type: ignore[misc]
    (tmp_path / "file").write_text("")
    assert check_disk("--out", tmp_path / "file" / "under", 1).status is Status.FAIL


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    if os.geteuid() == 0:  # whom no mode stops
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert check_disk("--state", tmp_path / "new", 1).status is Status.FAIL
    tmp_path.chmod(0o700)


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert available_memory(tmp_path) > 0
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert available_memory(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) > 600


def test_checkpoints_of_another_job_are_in_the_way(tmp_path: Path) -> None:
    assert check_checkpoints("--out", tmp_path, "1" * 64) is None
    path = state_files.save(tmp_path, 3, {}, {"job": "0" * 64})
    answers = [check_checkpoints("--out", tmp_path, digit * 64) for digit in "01"]
    assert [answer and answer.status for answer in answers] == [Status.OK, Status.FAIL]
    (path / state_files.FACTS).write_text("{")
    torn = check_checkpoints("--out", tmp_path, "0" * 64)
    assert torn is not None
    assert torn.status is Status.WARN


def test_devices() -> None:
    assert check_device("cpu").status is Status.OK
    assert check_device("cuda:99").status is check_device("frob").status is Status.FAIL


def test_estimates_are_what_the_parts_really_weigh(house: House) -> None:
    from launcher.preflight.models import count
    from shared.model.checkpoint import Checkpoint
    from shared.model.plan import SplitPlan

    for tied in (False, True):
        checkpoint = Checkpoint(str(save_tiny_model("llama", house.folder / f"tied-{tied}", tied=tied)))
        parts = load_client_parts(checkpoint, house.job)
        each = {id(p): p for part in (parts.head, parts.tail) for p in part.module.parameters()}
        train = sum(parameter.numel() for parameter in parts.parameters.values())
        whole = sum(parameter.numel() for parameter in each.values())
        assert count(checkpoint, house.job, SplitPlan(1, 1, 4), ("head", "tail")) == (whole - train, train)


def test_what_others_say_cannot_break_the_table() -> None:
    rows = Checklist()
    rows.add(Check("a", Status.OK, one_line("two\nlines \x1b[31m")))
    assert rows.rows[0].found == ascii("two lines \x1b[31m")
    assert check_disk("--out", Path(), 2_500, lambda _: 1_500).found == (
        "1.5 kB free for ., checkpoints need about 2.5 kB"
    )


def test_what_the_aggregation_keeps_is_counted(tmp_path: Path) -> None:
    checkpoint = Checkpoint(str(save_tiny_model("llama", tmp_path)))
    plan = SplitPlan(1, 1, 4)

    def need(kind: str) -> Need:
        job = parse_job({"model_name_or_path": "m", "aggregation": {"type": kind}}, "job")
        return server_need(checkpoint, job, plan, 2)

    averages = need("fedavgm").memory - need("fedavg").memory
    trained = count(checkpoint, parse_job({"model_name_or_path": "m"}, "job"), plan, ("head", "tail"))[1]
    assert averages == 4 * trained > 0
    assert need("fedadam").memory - need("fedavg").memory == 2 * averages
    assert need("fedadam").disk - need("fedavg").disk == 2 * 2 * averages


def test_whole_residuals_are_counted_and_sent(tmp_path: Path) -> None:
    """As many values as the weights under the adapters have: at the client, on disk, at the server, on the way."""
    checkpoint = Checkpoint(str(save_tiny_model("llama", tmp_path)))
    plan = SplitPlan(1, 1, 4)

    def job_of(lora: str, **cohort: Any) -> Job:
        return parse_job(
            {"model_name_or_path": "m", "aggregation": {"type": "fedavg", "lora": lora}, "cohort": cohort}, "job"
        )

    exact, average = job_of("exact"), job_of("average")
    parts = load_client_parts(checkpoint, exact)
    values = sum(layer.weight.numel() for layer, _ in parts.residuals.layers.values())
    assert residual_values(checkpoint, exact, plan, ("head", "tail")) == values > 0
    assert residual_values(checkpoint, average, plan, ("head", "tail")) == 0
    mine, without = (client_need(checkpoint, job, plan, 3) for job in (exact, average))
    assert (mine.memory - without.memory, mine.disk - without.disk) == (8 * values, 4 * values)
    its, without = (server_need(checkpoint, job, plan, 3) for job in (exact, average))
    assert (its.memory - without.memory, its.disk - without.disk) == (4 * values, 3 * 4 * values)
    own, without = (server_need(checkpoint, job_of(k, adapters="per_client"), plan, 1) for k in ("exact", "average"))
    (up, down), (up_without, down_without) = (round_traffic(checkpoint, job, plan) for job in (exact, average))
    assert (up, down - down_without) == (up_without, 4 * values)
    in_trunk = residual_values(checkpoint, exact, plan, ("trunk",))
    assert own.disk - without.disk == 4 * (values + in_trunk)
    assert own.memory - without.memory == 4 * (values + 3 * in_trunk)


@pytest.mark.parametrize("head", [True, False])
def test_a_rounds_traffic_is_that_of_full_batches(head: bool, tmp_path: Path) -> None:
    """Tensors as they are encoded: two batches a step, three steps, and the update."""
    checkpoint = Checkpoint(str(save_tiny_model("llama", tmp_path)))
    values = {
        "model_name_or_path": "m",
        "training": {"parts": ["head", "tail"] if head else ["tail"], "gradient_accumulation_steps": 2},
        "rounds": {"local_steps": 3},
        "data": {"max_length": 20},
        "wire": {"hidden": "int8", "gradient": "bfloat16"},
    }
    job = parse_job(values, "job")
    batch = torch.ones(8 * 20, checkpoint.config.hidden_size)
    hidden, gradient = (6 * len(encode("x", batch, name)[1]) for name in ("int8", "bfloat16"))
    update = sum(4 * p.numel() for p in load_client_parts(checkpoint, job).parameters.values())
    up, down = round_traffic(checkpoint, job, SplitPlan(1, 1, 4))
    assert (up, down) == (update + hidden + gradient, update + hidden + gradient * head)


@pytest.mark.parametrize("every", [1, 2])
def test_what_is_said_of_traffic_is_what_a_run_takes(every: int, tmp_path: Path) -> None:
    """With rows of full length; greetings, headers and seals are the rest."""
    folder = save_tiny_model("llama", tmp_path / "model")
    values = {
        "model_name_or_path": str(folder),
        "method": {"type": "lora"},
        "training": {"per_device_train_batch_size": 2},
        "rounds": {"count": 4, "local_steps": 3, "evaluate_every": every},
        "data": {"max_length": 24},
        "wire": {"hidden": "int8"},
    }
    job = parse_job(values, "job")
    rows, held_out = ([Row(tuple(range(2, 26)), (True,) * 24)] * count for count in (8, 13))
    run = train(job, {"a": rows}, tmp_path, validation=held_out)
    checkpoint = Checkpoint(str(folder))
    up, down = round_traffic(checkpoint, job, SplitPlan(1, 1, 4))
    scored = evaluation_traffic(checkpoint, job, held_out)
    evaluations = 4 // every + 1
    assert scored > up / 4
    assert run.bytes_up["a"] == pytest.approx(4 * up + evaluations * scored, rel=0.15)
    assert run.bytes_down["a"] == pytest.approx(4 * down + evaluations * scored, rel=0.15)


def test_a_sum_that_a_client_opens_is_counted(tmp_path: Path) -> None:
    checkpoint = Checkpoint(str(save_tiny_model("llama", tmp_path)))
    plan = SplitPlan(1, 1, 4)
    (mine, (up, down)), (without, (up_without, down_without)) = (
        (client_need(checkpoint, job, plan, 3), round_traffic(checkpoint, job, plan))
        for key in (fingerprint(GroupKey(bytes(32))), None)
        for job in [
            parse_job(
                {
                    "model_name_or_path": "m",
                    "cohort": {"clients": 3},
                    "aggregation": {"type": "fedavg", "group_key": key},
                },
                "job",
            )
        ]
    )
    values = count(checkpoint, parse_job({"model_name_or_path": "m"}, "job"), plan, ("head", "tail"))[1]
    assert (up - up_without, down - down_without) == (4 * values, 8 * values)
    assert (mine.memory - without.memory, mine.disk) == (48 * values, without.disk)


def test_a_group_key_that_does_not_fit_the_job_is_said(house: House) -> None:
    create_group_key(Path("group.key"))
    rows = house.check("client", "--job", "job.yaml", "--group-key", "group.key", expect=4)
    assert rows["group key"]["status"] == "fail"
    assert "the job has no aggregation.group_key" in rows["group key"]["found"]


def test_what_a_round_began_with_is_counted_once_whoever_needs_it(tmp_path: Path) -> None:
    checkpoint = Checkpoint(str(save_tiny_model("llama", tmp_path)))
    plan = SplitPlan(1, 1, 4)
    trained = 4 * count(checkpoint, parse_job({"model_name_or_path": "m"}, "job"), plan, ("head", "tail"))[1]

    def need(aggregation: Mapping[str, Any], **sections: Any) -> int:
        """Beside what a plain job needs, in copies of what is trained."""
        plain = parse_job({"model_name_or_path": "m"}, "job")
        values = {"model_name_or_path": "m", "aggregation": {"type": "fedavg", **aggregation}, **sections}
        least = client_need(checkpoint, plain, plan, 3).memory
        more, rest = divmod(client_need(checkpoint, parse_job(values, "job"), plan, 3).memory - least, trained)
        assert rest == 0
        return more

    masked = {"cohort": {"clients": 3}, "rounds": {"weighting": "clients"}}
    private = {
        "privacy": {"type": "central", "clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5},
        "training": {"parts": ["head", "tail"]},
    }
    assert need({}) == 0
    assert need({"proximal_mu": 0.1}) == 1
    assert need({}, **masked) == 1 + 3
    assert need({"proximal_mu": 0.1}, **masked) == 1 + 3
    assert need({"secure": "off"}, **masked, **private) == 1 + 5
    assert need({}, **masked, **private) == 1 + 3 + 5


def test_what_is_kept_of_differences_is_counted(tmp_path: Path) -> None:
    checkpoint = Checkpoint(str(save_tiny_model("llama", tmp_path)))
    plan = SplitPlan(1, 1, 4)

    def needs(**wire: float) -> tuple[Need, Need]:
        job = parse_job({"model_name_or_path": "m", "wire": wire}, "job")
        return client_need(checkpoint, job, plan, 3), server_need(checkpoint, job, plan, 2)

    (client, server), (up, _), (down, told) = needs(), needs(update_density=0.1), needs(average_density=0.1)
    trained = 4 * count(checkpoint, parse_job({"model_name_or_path": "m"}, "job"), plan, ("head", "tail"))[1]
    # What the round began with, and what is unsent before it and after.
    assert up.memory - client.memory == 3 * trained > 0
    assert up.disk - client.disk == 3 * 2 * trained
    assert (down.memory - client.memory, down.disk) == (trained, client.disk)
    assert (told.memory - server.memory, told.disk - server.disk) == (trained, 2 * trained)


@pytest.mark.parametrize(
    ("replicas", "secure", "status"), [("2", "off", "ok"), ("2", None, "fail"), ("4", "off", "fail")]
)
def test_servers_that_may_not_train_together_are_told_so(
    replicas: str, secure: str | None, status: str, house: House
) -> None:
    job = house.job.model_dump(mode="json") | {"cohort": {"clients": 3}, "aggregation": {"secure": secure}}
    Path("several.yaml").write_text(json.dumps(job))
    words = ["--job", "several.yaml", "--replicas", replicas, "--replica", "0"]
    assert house.check("server", *words)["replicas"]["status"] == status
