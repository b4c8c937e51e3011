"""Roles as child processes: started, listened to through JSON lines, stopped in good order."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from shared.errors import DeadlineExceeded, FlglmError

STOP_S = 20.0
TAIL_BYTES = 16_384
KEPT_EVENTS = 256


class RoleFailed(FlglmError):
    """A role's process ended with an error; its own line is the message, its exit code ours."""

    code = "role_failed"

    def __init__(self, name: str, exit_code: int, line: str) -> None:
        super().__init__(f"{name}: {line}")
        self.exit_code = exit_code  # type: ignore[misc]


@dataclass
class Role:
    """One process: its latest events, and the tail of its log for when it fails."""

    role: str
    name: str
    process: "subprocess.Popen[str]"
    log: Path
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    listener: threading.Thread | None = None

    @property
    def exit_code(self) -> int | None:
        return self.process.poll()

    def last_words(self) -> str:
        """What it said was wrong: its own error line if it wrote one."""
        lines = _tail(self.log).splitlines() if self.log.exists() else []
        said = [line.removeprefix("flglm: ") for line in lines if line.startswith("flglm: ")]
        return said[-1] if said else (lines[-1] if lines else f"ended with exit code {self.exit_code}")


class Cluster:
    """Processes of one run. Leaving the context stops all of them, whatever happened."""

    def __init__(self, logs: Path, environment: Mapping[str, str] | None = None) -> None:
        self.logs = logs
        self.environment = {**os.environ, **(environment or {}), "PYTHONUNBUFFERED": "1"}
        self.roles: list[Role] = []
        self._events: queue.SimpleQueue[tuple[Role, dict[str, Any]]] = queue.SimpleQueue()

    def __enter__(self) -> "Cluster":
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, role: str, name: str, arguments: Sequence[str], within: Sequence[str] = ()) -> Role:
        """`flglm <arguments> --format jsonl` as a process; its log goes to `<logs>/<name>.log`.

        `within`: words before the command, which run it somewhere else (another namespace) as the same process. One of
        that name that has ended is forgotten.
        """
        for ended in [role for role in self.roles if role.name == name and role.exit_code is not None]:
            self._put_away(ended)
            self.roles.remove(ended)
        log = self.logs / f"{name}.log"
        command = [*within, sys.executable, "-m", "launcher.main", *arguments, "--format", "jsonl"]
        with log.open("a") as stderr:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, stdin=subprocess.DEVNULL, text=True,
                env=self.environment, start_new_session=True,
            )  # fmt: skip
        started = Role(role, name, process, log)
        self.roles.append(started)
        started.listener = threading.Thread(target=self._listen, args=(started,), name=f"listen-{name}", daemon=True)
        started.listener.start()
        return started

    def events(self, timeout_s: float) -> Iterator[tuple[Role, dict[str, Any]]]:
        """The events that came, after waiting up to `timeout_s` for the first."""
        with contextlib.suppress(queue.Empty):
            yield self._events.get(timeout=timeout_s)
            while True:
                yield self._events.get_nowait()

    def wait_for(self, role: Role, event: str, timeout_s: float) -> dict[str, Any]:
        """The first event of that kind from a role. Raises RoleFailed or DeadlineExceeded."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for found in list(role.events):
                if found.get("event") == event:
                    return found
            self.check()
            time.sleep(0.02)
        raise DeadlineExceeded(f"{role.name} was not ready after {timeout_s:g} s", hint=f"see {role.log}")

    def check(self) -> None:
        """Raises RoleFailed if a process has ended with an error."""
        for role in self.roles:
            if role.exit_code not in (None, 0):
                raise RoleFailed(role.name, role.exit_code or 5, role.last_words())

    def stop(self) -> None:
        """SIGTERM to all, clients first; SIGKILL to what is still there after `STOP_S` seconds."""
        for role in reversed(self.roles):
            if role.exit_code is None:
                role.process.terminate()
        deadline = time.monotonic() + STOP_S
        for role in self.roles:
            try:
                role.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                role.process.kill()
                role.process.wait()
            self._put_away(role)

    @staticmethod
    def _put_away(role: Role) -> None:
        if role.listener is not None:  # until it has read what the process said last
            role.listener.join(STOP_S)
        if role.process.stdout is not None:
            role.process.stdout.close()

    def _listen(self, role: Role) -> None:
        assert role.process.stdout is not None
        for line in role.process.stdout:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    role.events.append(event)
                    self._events.put((role, event))


def _tail(log: Path) -> str:
    """The end of a log that may have grown for weeks."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")
