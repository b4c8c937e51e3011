"""The most memory that this process has had."""

import resource
from pathlib import Path


def peak_memory_bytes() -> int:
    """Peak resident bytes of this program.

    Linux's VmHWM: getrusage would count what the parent held when it started us.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
