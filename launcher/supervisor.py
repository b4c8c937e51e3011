"""Roles that are started again when they die: what systemd or a container engine does, for one machine.

A role that ended well has done its work. One whose arguments or files are wrong, or that was refused, would end so
again: it stops the others. Everything else, a kill included, is started again after a pause, as long as the role
does not die `MAX_QUICK_DEATHS` times in a row soon after its start.
"""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from launcher.cluster import Cluster, Role, RoleFailed
from shared.errors import Refused, UsageError
from shared.yaml_files import read_mapping, validated

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
QUICK_S = 10.0
MAX_QUICK_DEATHS = 8
FINAL_CODES = (Refused.exit_code, UsageError.exit_code)
KINDS = ("broker", "server", "client")


class Plan(BaseModel):
    """`roles`: the words of a flglm command, by a name of your choice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    roles: dict[str, list[str]] = Field(min_length=1, max_length=64)


def load_plan(path: Path) -> Plan:
    """Raises JobError, UsageError."""
    plan = validated(read_mapping(path, "plan"), Plan, str(path))
    for name, words in plan.roles.items():
        if not words or words[0] not in KINDS:
            raise UsageError(f"{path}: roles.{name} begins with none of {', '.join(KINDS)}")
    return plan


@dataclass
class _Charge:
    """A role under supervision."""

    words: Sequence[str]
    role: Role
    started: float
    quick_deaths: int = 0
    due: float | None = None
    restarts: int = 0


class Supervisor:
    """Starts the roles in their order; `turn()` looks after them, until `done`."""

    def __init__(
        self, cluster: Cluster, roles: Mapping[str, Sequence[str]], note: Callable[[str], Any] = print
    ) -> None:
        self.cluster = cluster
        self.note = note
        self.charges = {
            name: _Charge(words, self._start(name, words), time.monotonic()) for name, words in roles.items()
        }

    @property
    def done(self) -> bool:
        """Whether all that are not a broker have ended well: brokers route until they are told to stop."""
        return all(c.role.exit_code == 0 for c in self.charges.values() if c.words[0] != "broker")

    @property
    def restarts(self) -> int:
        return sum(charge.restarts for charge in self.charges.values())

    def turn(self) -> None:
        """Raises RoleFailed if a role will not come to life."""
        now = time.monotonic()
        for name, charge in self.charges.items():
            code = charge.role.exit_code
            if code in (None, 0):
                continue
            if charge.due is None:
                self._died(name, charge, code, now)
            elif now >= charge.due:
                charge.role, charge.started, charge.due = self._start(name, charge.words), now, None
                charge.restarts += 1

    def kill(self, name: str) -> bool:
        """SIGKILL, for those who want to see what happens. False if it is not running."""
        role = self.charges[name].role
        if role.exit_code is not None:
            return False
        role.process.send_signal(signal.SIGKILL)
        role.process.wait()
        return True

    def _start(self, name: str, words: Sequence[str]) -> Role:
        return self.cluster.start(words[0], name, words)

    def _died(self, name: str, charge: _Charge, code: int | None, now: float) -> None:
        words = charge.role.last_words()
        charge.quick_deaths = charge.quick_deaths + 1 if now - charge.started < QUICK_S else 0
        if code in FINAL_CODES or charge.quick_deaths >= MAX_QUICK_DEATHS:
            raise RoleFailed(name, code or 5, words)
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** max(0, charge.quick_deaths - 1))
        self.note(f"{name} ended ({'killed' if code == -signal.SIGKILL else words}); again in {pause_s:g} s")
        charge.due = now + pause_s
