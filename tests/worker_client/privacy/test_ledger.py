"""A data owner's ledger: it adds up over jobs, never overspends, and nothing makes it forget."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shared.errors import LedgerError, Refused
from shared.job import Job, parse_job
from worker_client.client import ledger_of
from worker_client.policy import Policy
from worker_client.privacy import ledger as module
from worker_client.privacy.accounting import epsilon
from worker_client.privacy.ledger import SUFFIX, Ledger, default_path, digest_of, path_of, read_entries

DATA = "d" * 64
DELTA = 1e-5


def job_of(multiplier: float = 1.0, type: str = "central", **changes: Any) -> Job:
    values = {
        "model_name_or_path": "m",
        "training": {"parts": ["head", "tail"]},
        "rounds": {"weighting": "clients"},
        "privacy": {"type": type, "clip_norm": 1.0, "noise_multiplier": multiplier, "delta": DELTA},
    }
    return parse_job(values | changes, "job")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl.privacy.json"


def test_rounds_of_all_jobs_count_together(path: Path) -> None:
    first, second = job_of(1.0), job_of(2.0, "local", name="second")
    ledger = Ledger(path, DATA)
    assert ledger.spent(first).rounds == 0
    assert [ledger.charge(first).rounds for _ in range(3)] == [1, 2, 3]
    spent = ledger.charge(second)
    assert (spent.rounds, spent.delta) == (1, DELTA)
    assert spent.epsilon == epsilon([(2.0, 1)], DELTA)
    assert spent.total_epsilon == epsilon([(1.0, 3), (2.0, 1)], DELTA)
    kept = [(e.job, e.type, e.noise_multiplier, e.rounds) for e in read_entries(path)]
    assert kept == [(first.digest().hex(), "central", 1.0, 3), (second.digest().hex(), "local", 2.0, 1)]
    assert Ledger(path, DATA).spent(second) == spent
    assert path.stat().st_mode & 0o077 == 0


def test_a_folder_has_one_for_each_file_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever trains on them, with whatever name for them, finds the same."""
    ledgers, ours, others = tmp_path / "ledgers", tmp_path / "a" / "rows.jsonl", tmp_path / "b" / "rows.jsonl"
    for folder in (ledgers, ours.parent, others.parent):
        folder.mkdir()
    for file in (ours, others):
        file.write_text("{}\n")
    monkeypatch.chdir(ours.parent)
    for rounds, name in ((1, ours), (2, Path("rows.jsonl")), (1, others)):
        ledger = ledger_of(name, ledgers, Policy(), job_of())
        assert ledger is not None
        assert ledger.charge(job_of()).rounds == rounds
    kept = {path.name for path in ledgers.iterdir() if not path.name.startswith(".")}
    assert kept == {str(file).strip("/").replace("/", "-") + SUFFIX for file in (ours, others)}
    assert path_of(ours, tmp_path / "mine.json") == tmp_path / "mine.json"
    assert path_of(ours, None) == default_path(ours) == ours.parent / "rows.jsonl.privacy.json"


def test_rows_that_were_changed_do_not_begin_anew(path: Path) -> None:
    Ledger(path, DATA).charge(job_of())
    spent = Ledger(path, "e" * 64).charge(job_of())
    assert spent.rounds == 2
    assert [(e.data, e.rounds) for e in read_entries(path)] == [(DATA, 1), ("e" * 64, 1)]


@pytest.mark.parametrize("affordable", [0, 1, 4])
def test_what_would_overspend_is_refused_and_changes_nothing(affordable: int, path: Path) -> None:
    limit = epsilon([(1.0, affordable)], DELTA) + 1e-6
    ledger, job = Ledger(path, DATA, limit, DELTA), job_of()
    for _ in range(affordable):
        ledger.check(job)
        ledger.charge(job)
    before = path.read_bytes() if affordable else None
    for refused in (ledger.check, ledger.charge):
        with pytest.raises(Refused, match=r"one more round .* more than max_epsilon=") as error:
            refused(job)
        assert error.value.reason == "privacy_budget"
        assert error.value.exit_code == 1
        assert str(path) in error.value.message
    assert (path.read_bytes() if path.exists() else None) == before


def test_another_job_finds_what_is_left(path: Path) -> None:
    ledger = Ledger(path, DATA, epsilon([(1.0, 2)], DELTA) + 1e-6, DELTA)
    ledger.charge(job_of(1.0))
    with pytest.raises(Refused):
        ledger.charge(job_of(0.9, name="less"))
    ledger.charge(job_of(1.1, name="more"))


def test_the_limit_is_at_the_owners_delta_not_at_the_jobs(path: Path) -> None:
    """At a larger delta epsilon is smaller: the operator does not choose."""
    at_owners, at_jobs = epsilon([(1.0, 1)], 1e-9), epsilon([(1.0, 1)], DELTA)
    with pytest.raises(Refused, match="at delta 1e-09"):
        Ledger(path, DATA, (at_owners + at_jobs) / 2, 1e-9).charge(job_of())
    Ledger(path, DATA, at_owners + 1e-6, 1e-9).charge(job_of())


def damaged(content: bytes) -> list[bytes]:
    document = json.loads(content)
    fewer = document | {"entries": [document["entries"][0] | {"rounds": 1}]}
    later = document | {"format": 2}
    return [b"", content[:-20], b"[]", b"\xff" * 40, json.dumps(fewer).encode(), json.dumps(later).encode()]


@pytest.mark.parametrize("damage", range(6))
def test_a_corrupt_ledger_is_named_and_left_as_it_is(damage: int, path: Path) -> None:
    ledger = Ledger(path, DATA)
    ledger.charge(job_of())
    ledger.charge(job_of())
    path.write_bytes(bad := damaged(path.read_bytes())[damage])
    for use in (ledger.charge, ledger.check, ledger.spent):
        with pytest.raises(LedgerError, match=r"rows\.jsonl\.privacy\.json") as error:
            use(job_of())
        assert "copy" in str(error.value.hint)
    assert path.read_bytes() == bad


def test_a_file_without_end_is_not_read(path: Path) -> None:
    path.write_bytes(b" " * (module.MAX_FILE_BYTES + 1))
    with pytest.raises(LedgerError, match="more than"):
        Ledger(path, DATA).spent(job_of())


def test_where_nothing_can_be_written_nothing_is_paid(path: Path) -> None:
    absent = path.parent / "nowhere" / "ledger.json"
    with pytest.raises(LedgerError, match="cannot be written") as error:
        Ledger(absent, DATA).charge(job_of())
    assert "--privacy-ledger" in str(error.value.hint)
    path.mkdir()
    with pytest.raises(LedgerError):
        Ledger(path, DATA).charge(job_of())


def test_two_at_once_both_count(path: Path) -> None:
    ledger = Ledger(path, DATA)
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: ledger.charge(job_of()), range(24)):
            pass
    assert ledger.spent(job_of()).rounds == 24


def test_who_holds_the_lock_for_ever_is_not_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_S", 0.1)
    Ledger(path, DATA).charge(job_of())
    before = path.read_bytes()
    held = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(LedgerError, match="another process"):
            Ledger(path, DATA).charge(job_of())
    finally:
        os.close(held)
    assert path.read_bytes() == before
    assert Ledger(path, DATA).charge(job_of()).rounds == 2


def test_killed_at_any_moment_it_is_whole_and_has_all_that_was_paid(path: Path) -> None:
    """A process pays and says so, again and again, until it is killed: what it said is there."""
    script = """
        import sys
        from pathlib import Path
        from tests.worker_client.privacy.test_ledger import DATA, job_of
        from worker_client.privacy.ledger import Ledger
        ledger, job = Ledger(Path(sys.argv[1]), DATA), job_of()
        while True:
            print(ledger.charge(job).rounds, flush=True)
    """
    said = 0
    root = Path(__file__).parents[3]
    for target in (5, 14):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), str(path)], stdout=subprocess.PIPE, text=True, cwd=root
        )
        assert process.stdout is not None
        for line in process.stdout:
            said = int(line)
            if said >= target:
                process.send_signal(signal.SIGKILL)
                break
        said = max([said, *map(int, process.stdout.read().split())])
        process.wait()
        process.stdout.close()
        assert said <= Ledger(path, DATA).spent(job_of()).rounds <= said + 1


def test_it_lies_beside_the_rows_and_knows_them(tmp_path: Path) -> None:
    rows = tmp_path / "notes.jsonl"
    rows.write_text("{}\n")
    assert default_path(rows) == tmp_path / "notes.jsonl.privacy.json"
    assert digest_of(rows) == "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
