"""The rows of a preflight: what was looked at, what was found, what to do about it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from shared.errors import FlglmError

T = TypeVar("T")


class Status(StrEnum):
    """`fail`: the role would not start or not get far. `warn`: it may, and somebody should look."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """`found` and `mend` are one printable line each; `mend` is empty where there is nothing to do."""

    name: str
    status: Status
    found: str
    mend: str = ""


def ok(name: str, found: str) -> Check:
    return Check(name, Status.OK, one_line(found))


def warn(name: str, found: str, mend: str) -> Check:
    return Check(name, Status.WARN, one_line(found), one_line(mend))


def fail(name: str, found: str, mend: str) -> Check:
    return Check(name, Status.FAIL, one_line(found), one_line(mend))


def one_line(text: str) -> str:
    """What comes from files and from others must neither break a table nor steer a terminal."""
    line = " ".join(text.split())
    return line if line.isprintable() else ascii(line)


@dataclass
class Checklist:
    """Rows in the order in which they were found; `note` hears of each at once."""

    note: Callable[[Check], None] = lambda _: None
    rows: list[Check] = field(default_factory=list)

    def add(self, check: Check) -> None:
        self.rows.append(check)
        self.note(check)

    def attempt(self, name: str, work: Callable[[], T], found: Callable[[T], str], mend: str) -> T | None:
        """What `work` returns, and a row that says so; or None, and a row with its FlglmError.

        `mend` is for errors that bring no hint of their own.
        """
        try:
            value = work()
        except FlglmError as error:
            self.add(fail(name, error.message, error.hint or mend))
            return None
        self.add(ok(name, found(value)))
        return value

    @property
    def failed(self) -> list[Check]:
        return [row for row in self.rows if row.status is Status.FAIL]
