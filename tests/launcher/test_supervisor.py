"""Roles that die are started again, within bounds; with real processes of a broker."""

import time
from pathlib import Path

import pytest

from launcher.cluster import Cluster, RoleFailed
from launcher.local_run import free_port
from launcher.supervisor import Supervisor, load_plan
from shared.errors import JobError, UsageError

WAIT_S = 30.0


def broker() -> list[str]:
    addresses = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
    return ["broker", "--clients-address", addresses[0], "--servers-address", addresses[1], "--plain"]


def ready(cluster: Cluster, supervisor: Supervisor, name: str) -> int:
    """The process id of the role, once it is ready."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        supervisor.turn()
        role = supervisor.charges[name].role
        if role.exit_code is None and any(event.get("event") == "ready" for event in list(role.events)):
            return role.process.pid
        time.sleep(0.02)
    pytest.fail(f"{name} was not ready")


def test_a_killed_role_is_started_again(tmp_path: Path) -> None:
    notes: list[str] = []
    with Cluster(tmp_path) as cluster:
        supervisor = Supervisor(cluster, {"broker": broker()}, notes.append)
        first = ready(cluster, supervisor, "broker")
        assert supervisor.kill("broker")
        assert not supervisor.kill("broker")
        assert ready(cluster, supervisor, "broker") != first
        assert supervisor.restarts == 1
        assert len(cluster.roles) == 1  # the dead one is forgotten: this may go on for weeks
        assert notes == ["broker ended (killed); again in 0.2 s"]
        assert supervisor.done  # nobody is left who has something to do


def test_wrong_arguments_are_not_tried_again(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        supervisor = Supervisor(cluster, {"broker": ["broker", "--frob"]})
        cluster.roles[0].process.wait(WAIT_S)
        with pytest.raises(RoleFailed, match="No such option") as failed:
            supervisor.turn()
        assert failed.value.exit_code == 4


def test_a_role_that_dies_again_and_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.supervisor.MAX_QUICK_DEATHS", 2)
    words = broker()
    words[words.index("--servers-address") + 1] = words[words.index("--clients-address") + 1]
    with Cluster(tmp_path) as cluster:
        supervisor = Supervisor(cluster, {"broker": words}, lambda line: None)
        with pytest.raises(RoleFailed, match="cannot listen"):
            ready(cluster, supervisor, "broker")
        assert supervisor.restarts == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("roles: {}", "roles"),
        ("roles: {a: [frob]}", "roles.a begins with none of broker, server, client"),
        ("roles: {a: []}", "roles.a begins with none"),
        ("role: {a: [broker]}", "did you mean 'roles'"),
    ],
)
def test_a_wrong_plan_gets_one_line(text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "up.yaml"
    path.write_text(text)
    with pytest.raises((JobError, UsageError), match=line):
        load_plan(path)
