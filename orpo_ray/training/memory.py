"""What a step frees stays with the process: the next step wants just as much."""

import ctypes
import os

# Numbers of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_OPTIONS = {
    # Blocks up to this size lie in a heap, others go back to the system when they are freed. First: where it is
    # refused, the others would only switch off malloc's own adjustment of it.
    _MMAP_THRESHOLD: 2**30,
    _TRIM_THRESHOLD: 2**30,  # an unused end of a heap up to this size is kept
    _TOP_PAD: 64 * 2**20,  # as large as a heap of a thread can be, so that an empty one is kept too
}


def keep_freed_memory() -> None:
    """Spare each step on a CPU thousands of page faults: whether there are any is otherwise a matter of luck.

    Nothing is changed where the C library is not glibc or refuses, or where the user has tuned it (`MALLOC_...`,
    `GLIBC_TUNABLES`). It holds for the whole process, which keeps up to a GiB of what it has freed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if mallopt is None or tuned or any(name.startswith("MALLOC_") for name in os.environ):
        return
    all(mallopt(option, value) for option, value in _OPTIONS.items())  # up to the first that is refused
