"""Whoever is taken off the server's list loses its open session, and nobody else does."""

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.fidelity import Case, make_job
from benchmarks.tiny_models import save_tiny_model
from launcher.in_process import serving
from shared.errors import FlglmError, KeyFileError, Refused
from worker_client.remote_trunk import RemoteTrunk

WAIT_S = 30.0


def test_a_revoked_client_is_out_within_a_second_and_the_others_stay(tmp_path: Path) -> None:
    job = make_job(save_tiny_model("llama", tmp_path / "model"), Case(("trunk",), 3))
    with serving(job, tmp_path, ["a", "b"]) as running, running.link("a") as out, running.link("b") as stays:
        service = running.running.service
        assert service is not None
        names: dict[bytes, str] = dict(service.sessions.admitted())
        del names[running.clients["a"].public]
        service.sessions.admitted = lambda: names
        began = time.monotonic()
        with pytest.raises(Refused) as revoked:
            RemoteTrunk(out, job, WAIT_S).join(1)
        assert revoked.value.reason == "revoked"
        assert time.monotonic() - began < 1.0
        assert stays.failure is None
        assert [session.client for session in service.sessions] == ["b"]
        with pytest.raises(FlglmError, match="not admitted"), running.link("a"):
            pass


def test_a_list_that_cannot_be_read_ends_no_session(tmp_path: Path) -> None:
    job = make_job(save_tiny_model("llama", tmp_path / "model"), Case(("trunk",), 3))
    with serving(job, tmp_path, ["a"]) as running, running.link("a") as link:
        service = running.running.service
        assert service is not None

        def unreadable() -> Mapping[bytes, str]:
            raise KeyFileError("bad.card: not JSON")

        service.sessions.admitted = unreadable
        time.sleep(0.6)
        assert link.failure is None
        assert len(list(service.sessions)) == 1
