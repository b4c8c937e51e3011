"""Room: disk for checkpoints, memory for the part of the model that a role holds, and the device for it."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher.preflight.checks import Check, fail, ok, warn
from launcher.report_data import bytes_text
from shared import state_files

# With less than this much beyond the estimate, which leaves activations out, somebody should look.
MEMORY_MARGIN = 1.5
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Need:
    """Estimates for one role: bytes of memory, without activations, and bytes on disk for its checkpoints."""

    memory: int
    disk: int


def check_disk(option: str, folder: Path, needed: int | None, free: Callable[[Path], int] | None = None) -> Check:
    """`folder`, or where it will be made, can be written to, and has room for `needed` bytes, where that is known."""
    there = existing(folder)
    if not there.is_dir():
        return fail("disk", f"{there} is no folder", f"give {option} another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        return fail("disk", f"{there} cannot be written to", f"give {option} another folder, or change its owner")
    room = (free or free_bytes)(there)
    if needed is None:
        return ok("disk", f"{bytes_text(room)} free for {folder}; how much is needed is not known")
    found = f"{bytes_text(room)} free for {folder}, checkpoints need about {bytes_text(needed)}"
    if room < needed:
        return fail("disk", found, f"make room, or give {option} a folder on a larger disk")
    return ok("disk", found)


def check_memory(needed: int, available: Callable[[], int] | None = None, where: str = "memory") -> Check:
    """Memory for `needed` bytes of weights, gradients and optimizer."""
    room = (available or available_memory)()
    found = f"{bytes_text(room)} available, weights and optimizer need about {bytes_text(needed)}"
    if room < needed:
        return fail(where, found, "stop other programs, take a larger machine, or ask for a job that needs less")
    if room < MEMORY_MARGIN * needed:
        return warn(where, found, "activations come on top: smaller batches or a shorter data.max_length need less")
    return ok(where, found)


def check_checkpoints(option: str, folder: Path, job_digest: str) -> Check | None:
    """Whose checkpoints lie in `folder` already; None if there are none."""
    try:
        numbers = state_files.numbers(folder)
    except OSError as error:
        return fail("resume", f"{folder}: {error.strerror}", f"give {option} another folder, or change its owner")
    if not numbers:
        return None
    newest = folder / f"checkpoint-{numbers[-1]}"
    try:
        owner = json.loads((newest / state_files.FACTS).read_text())["facts"]["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return warn("resume", f"{newest} is corrupt", "an older one will be used; remove it to be rid of this line")
    if owner != job_digest:
        return fail("resume", f"{folder} holds checkpoints of another job", f"give {option} another folder")
    return ok("resume", f"would continue from {newest}")


def existing(folder: Path) -> Path:
    """`folder`, or the nearest above it that is there."""
    return next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def available_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that this process may still take, a container's limit included."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return available
    return max(0, min(available, limit - used))
