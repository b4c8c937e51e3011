"""`flglm top`: rates from two looks, over a real broker, and what it says where nobody answers."""

import json
from pathlib import Path

import pytest

from launcher.cluster import Cluster
from launcher.local_run import free_port
from launcher.main import main
from launcher.top import Look, figures, missed, table
from shared.errors import ConnectionFailed

WAIT_S = 30.0
SERVER = {
    "flglm_server_sessions": 3.0,
    "flglm_server_round": 2.0,
    "flglm_server_queue_requests": 1.0,
    'flglm_server_cohorts_total{purpose="train"}': 8.0,
    'flglm_server_cohorts_total{purpose="evaluate"}': 2.0,
    "flglm_server_cohort_requests_sum": 30.0,
    "flglm_server_cohort_requests_count": 10.0,
    "flglm_server_wait_seconds_sum": 0.5,
    "flglm_server_wait_seconds_count": 50.0,
    "flglm_server_cohort_tokens_total": 1000.0,
    "flglm_server_compute_seconds_total": 1.0,
    'flglm_server_bytes_total{direction="up"}': 1e6,
    'flglm_server_bytes_total{direction="down"}': 1e6,
    "process_cpu_seconds_total": 4.0,
    "process_resident_memory_bytes": 4e6,
}


def test_rates_are_what_was_added_between_two_looks() -> None:
    later = {
        key: 2 * value if key.endswith(("_total", "_sum", "_count")) or "{" in key else value
        for key, value in SERVER.items()
    }
    shown = figures(Look("here", 10.0, SERVER), Look("here", 12.0, later))
    assert shown["role"] == "server"
    assert shown["cohorts_per_s"] == 5
    assert shown["requests_per_cohort"] == 3
    assert shown["wait_ms"] == 10
    assert shown["tokens_per_s"] == 500
    assert shown["mb_per_s"] == 1
    assert shown["trunk_busy"] == 0.5
    assert shown["cores"] == 2
    assert shown["memory_mb"] == 4


def test_a_role_that_was_started_again_counts_anew() -> None:
    young = SERVER | {'flglm_server_cohorts_total{purpose="train"}': 2.0}
    assert figures(Look("here", 0.0, SERVER), Look("here", 2.0, young))["cohorts_per_s"] == 2


def test_a_role_that_does_not_answer_has_its_trouble_shown_beside_the_others() -> None:
    gone = missed("there", 2.0, ConnectionFailed("no metrics at there"))
    assert figures(gone, gone) == {"trouble": "no metrics at there"}
    back = figures(gone, Look("there", 4.0, SERVER))
    assert back["sessions"] == 3
    assert back["cohorts_per_s"] == 0
    assert table([(gone, figures(gone, gone))]).row_count == 1


def test_a_running_broker_is_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clients, servers = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    watched = f"127.0.0.1:{free_port()}"
    words = [
        "broker",
        "--clients-address",
        clients,
        "--servers-address",
        servers,
        "--plain",
        "--metrics-address",
        watched,
    ]
    with Cluster(tmp_path) as cluster:
        ready = cluster.wait_for(cluster.start("broker", "broker", words), "ready", WAIT_S)
        assert ready["metrics"] == watched
        with pytest.raises(SystemExit) as ended:
            main(["top", watched, "--interval", "0.1", "--format", "json"])
        assert ended.value.code == 0
        (role,) = json.loads(capsys.readouterr().out)["data"]["roles"]
        assert role["role"] == "broker"
        assert role["sessions"] == 0
        assert role["memory_mb"] > 10
        with pytest.raises(SystemExit) as ended:
            main(["top", watched, "--interval", "0.1", "--count", "1"])
        assert ended.value.code == 0
        assert "messages/s" in capsys.readouterr().out


def test_nobody_there_is_one_line_and_a_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["top", f"127.0.0.1:{free_port()}", "--format", "json"])
    assert ended.value.code == 2
    assert "--metrics-address" in json.loads(capsys.readouterr().out)["hint"]
