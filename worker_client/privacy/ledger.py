"""What was spent of the privacy of a data owner's rows, over all jobs: a file that is the owner's, and outlives them.

An entry is a job on a file of rows, and how many of its rounds were paid for. All entries of a ledger count together,
whatever file of rows they were for: one that was changed still holds most of what it held. So rows of other people
deserve a ledger of their own. It is written beside its place, flushed and renamed, with a digest over the entries, and
changed by one process at a time.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import DataError, LedgerError, Refused
from shared.job import GaussianPrivacy, Job
from shared.job.privacy import Delta, NoiseMultiplier
from shared.key_files import Hex32
from worker_client.privacy.accounting import epsilon

SUFFIX = ".privacy.json"
MAX_FILE_BYTES = 4 * 2**20
LOCK_S = 30.0
POLL_S = 0.05


class Entry(BaseModel):
    """`job` and `data`: SHA-256 of the job's canonical JSON and of the file of rows. `rounds` paid for."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    job: Hex32
    data: Hex32
    name: Annotated[str, Field(max_length=64)]
    type: Literal["central", "local"]
    noise_multiplier: NoiseMultiplier
    delta: Delta
    rounds: Annotated[int, Field(ge=1, lt=2**53)]


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1]
    entries: list[Entry]
    sha256: Hex32


@dataclass(frozen=True)
class Spent:
    """`epsilon` at `delta` of one job's `rounds`; `total_epsilon` at `total_delta` of all jobs in the ledger."""

    rounds: int
    epsilon: float
    delta: float
    total_epsilon: float
    total_delta: float


@dataclass(frozen=True)
class Ledger:
    """For the rows of digest `data`. `max_epsilon`, at `max_delta`: what the owner allows to all jobs together."""

    path: Path
    data: str
    max_epsilon: float | None = None
    max_delta: float | None = None

    def spent(self, job: Job) -> Spent:
        """Raises LedgerError."""
        return self._spent(read_entries(self.path), job)

    def check(self, job: Job) -> None:
        """Whether one more round can be paid for. Raises Refused (`privacy_budget`), LedgerError."""
        self._allow(_charged(read_entries(self.path), job, self.data), job)

    def charge(self, job: Job) -> Spent:
        """Pay for one more round: on disk when this returns. Raises Refused (`privacy_budget`) and LedgerError, and
        nothing is changed then.
        """
        with _locked(self.path):
            entries = _charged(read_entries(self.path), job, self.data)
            self._allow(entries, job)
            _write(self.path, entries)
        return self._spent(entries, job)

    def _allow(self, entries: Sequence[Entry], job: Job) -> None:
        if self.max_epsilon is None:
            return
        spent = self._spent(entries, job)
        if spent.total_epsilon > self.max_epsilon:
            raise Refused(
                f"the privacy of these rows is spent: one more round of the job would make epsilon "
                f"{spent.total_epsilon:.4g} at delta {spent.total_delta:g}, more than max_epsilon={self.max_epsilon:g} "
                f"({self.path})",
                reason="privacy_budget",
                hint="ask the operator for more noise or fewer rounds; rows of other people have a ledger of their own "
                "(--privacy-ledger)",
            )

    def _spent(self, entries: Sequence[Entry], job: Job) -> Spent:
        privacy = job.privacy
        assert isinstance(privacy, GaussianPrivacy)
        rounds = sum(entry.rounds for entry in entries if entry.job == job.digest().hex())
        total_delta = privacy.delta if self.max_delta is None else self.max_delta
        return Spent(
            rounds,
            epsilon([(privacy.noise_multiplier, rounds)], privacy.delta),
            privacy.delta,
            epsilon_of(entries, total_delta),
            total_delta,
        )


def epsilon_of(entries: Sequence[Entry], delta: float) -> float:
    """Of all of them together."""
    return epsilon([(entry.noise_multiplier, entry.rounds) for entry in entries], delta)


def default_path(data: Path) -> Path:
    """Beside the rows: every job on them, with whatever key and result folder, finds the same."""
    return data.with_name(data.name + SUFFIX)


def path_of(data: Path, chosen: Path | None) -> Path:
    """The ledger for the rows in `data`: by default beside them; in a folder, a file named after where the rows lie, as
    `srv-notes.jsonl.privacy.json` for /srv/notes.jsonl; else the file `chosen`.
    """
    if chosen is None:
        return default_path(data)
    if chosen.is_dir():
        return chosen / (str(data.resolve()).strip("/").replace("/", "-") + SUFFIX)
    return chosen


def read_entries(path: Path) -> list[Entry]:
    """Those of the ledger; none if there is no file. Raises LedgerError if it cannot be read, or is not whole."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unusable(path, error.strerror or "cannot be read") from None
    if len(content) > MAX_FILE_BYTES:
        raise _unusable(path, f"more than {MAX_FILE_BYTES} bytes")
    try:
        document = _Document.model_validate_json(content)
    except ValidationError:
        raise _unusable(path, "not a privacy ledger") from None
    if _digest(document.entries) != document.sha256:
        raise _unusable(path, "not what was written")
    return document.entries


def digest_of(data: Path) -> str:
    """SHA-256 of a file of rows, in hexadecimal. Raises DataError."""
    try:
        with data.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{data}: {error.strerror}") from None


def _charged(entries: Sequence[Entry], job: Job, data: str) -> list[Entry]:
    """With one more round of the job."""
    privacy, digest = job.privacy, job.digest().hex()
    assert privacy.type != "none"
    others = [entry for entry in entries if (entry.job, entry.data) != (digest, data)]
    before = sum(entry.rounds for entry in entries) - sum(entry.rounds for entry in others)
    mine = Entry(
        job=digest,
        data=data,
        name=job.name,
        type=privacy.type,
        noise_multiplier=privacy.noise_multiplier,
        delta=privacy.delta,
        rounds=before + 1,
    )
    return [*others, mine]


def _write(path: Path, entries: list[Entry]) -> None:
    document = _Document(format=1, entries=entries, sha256=_digest(entries))
    draft = path.with_name(f".{path.name}.draft")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(document.model_dump_json(indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise _unwritable(path, error) from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time. A lock is a file beside the ledger, which stays; whoever dies lets go of it."""
    try:
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        _seize(lock, path)
        yield
    finally:
        os.close(lock)


def _seize(lock: int, path: Path) -> None:
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise LedgerError(f"{path}: another process has held it for {LOCK_S:g} s") from None
            time.sleep(POLL_S)
        else:
            return


def _digest(entries: Sequence[Entry]) -> str:
    plain = [entry.model_dump(mode="json") for entry in entries]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _unusable(path: Path, reason: str) -> LedgerError:
    return LedgerError(
        f"{path}: {reason}",
        hint="put back a copy of it; without one, what was spent on these rows is not known, and none should be",
    )


def _unwritable(path: Path, error: OSError) -> LedgerError:
    return LedgerError(
        f"{path}: cannot be written ({error.strerror or error})",
        hint="name a place for it that is kept: --privacy-ledger FILE",
    )
