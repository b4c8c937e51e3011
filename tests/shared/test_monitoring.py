"""What a role says over HTTP: its health, whether it serves, its numbers; and what it does not put up with."""

import json
import socket
import time
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Gauge

from shared.errors import ConnectionFailed, UsageError
from shared.monitoring import LONGEST_TURN_S, REQUEST_S, Health, monitored, split_address


def get(where: str | None, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{where}{path}", timeout=4 * REQUEST_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.fixture
def registry() -> CollectorRegistry:
    made = CollectorRegistry()
    Gauge("flglm_test_things", "Things.", registry=made).set(3)
    return made


def test_metrics_are_given_in_prometheus_text(registry: CollectorRegistry) -> None:
    with monitored("127.0.0.1:0", registry, Health()) as where:
        status, text = get(where, "/metrics")
    assert status == 200
    assert "flglm_test_things 3.0" in text


def test_ready_only_while_it_serves_and_healthy_as_long_as_its_loop_comes_round(registry: CollectorRegistry) -> None:
    health = Health()
    with monitored("127.0.0.1:0", registry, health) as where:
        assert [get(where, path)[0] for path in ("/health", "/ready")] == [200, 503]
        health.ready = True
        health.beat(time.monotonic())
        assert [get(where, path)[0] for path in ("/health", "/ready")] == [200, 200]
        health.beat(time.monotonic() - LONGEST_TURN_S - 1)
        status, text = get(where, "/health")
        assert status == 503
        assert "hangs" in json.loads(text)["status"]
        assert get(where, "/ready")[0] == 503


def test_nothing_else_is_there(registry: CollectorRegistry) -> None:
    with monitored("127.0.0.1:0", registry, Health()) as where:
        assert get(where, "/../etc/passwd")[0] == 404


def test_whoever_connects_and_says_nothing_holds_others_up_for_a_moment_only(registry: CollectorRegistry) -> None:
    with monitored("127.0.0.1:0", registry, Health()) as where:
        assert where is not None
        with socket.create_connection(split_address(where)):
            assert get(where, "/health")[0] == 200


def test_a_port_in_use_is_said_so(registry: CollectorRegistry) -> None:
    with (
        monitored("127.0.0.1:0", registry, Health()) as where,
        pytest.raises(ConnectionFailed, match="cannot listen"),
        monitored(where, registry, Health()),
    ):
        pass


@pytest.mark.parametrize("address", ["9464", "host:", ":9464", "host:port", "host:70000"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="no address"):
        split_address(address)


def test_without_an_address_nothing_listens(registry: CollectorRegistry) -> None:
    with monitored(None, registry, Health()) as where:
        assert where is None
