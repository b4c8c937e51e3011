"""glibc's allocator, told to keep freed memory for the next step.

By default it gives large blocks back to the kernel at once and asks for them anew at the next step, which then zeroes
every page: in a training step on a CPU that took up to half of the processor's time (docs/log.md). Peak memory is the
same; between steps a process keeps what the last one needed.
"""

import ctypes

# <malloc.h>
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4
M_ARENA_MAX = -8
NEVER = 2**31 - 1
GROW_BY = 2**26


def keep_freed_memory() -> bool:
    """Call before other threads start. Whether the C library knew what to do; others than glibc are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One arena, grown in one piece, never trimmed, and large blocks in it: nothing is mapped and unmapped apart.
    wanted = {M_ARENA_MAX: 1, M_TRIM_THRESHOLD: NEVER, M_MMAP_MAX: 0, M_TOP_PAD: GROW_BY}
    done = [mallopt(option, value) for option, value in wanted.items()]
    return all(done)
