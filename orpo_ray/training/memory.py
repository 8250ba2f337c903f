"""The memory of this process: how much is free, what a run of something takes, and that freed
blocks are kept.
"""

import ctypes
import os
import re
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch.autograd.profiler import profile

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE
)

# Numbers of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_OPTIONS = {
    # Blocks up to this size lie in a heap, others go back to the system when they are freed. First:
    # where it is refused, the others would only switch off malloc's own adjustment of it.
    _MMAP_THRESHOLD: 2**30,
    _TRIM_THRESHOLD: 2**30,  # an unused end of a heap up to this size is kept
    _TOP_PAD: 64 * 2**20,  # as large as a heap of a thread can be, so that an empty one is kept too
}


def keep_freed_memory() -> None:
    """Spare each step on a CPU thousands of page faults: whether there are any is otherwise a
    matter of luck.

    Nothing is changed where the C library is not glibc or refuses, or where the user has tuned it
    (`MALLOC_...`, `GLIBC_TUNABLES`). It holds for the whole process, which keeps up to a GiB of
    what it has freed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if mallopt is None or tuned or any(name.startswith("MALLOC_") for name in os.environ):
        return
    all(
        mallopt(option, value) for option, value in _OPTIONS.items()
    )  # up to the first that is refused


class CpuMemory:
    """That of the machine, shared evenly by the processes of a run that it holds."""

    def __init__(self, processes: int = 1) -> None:
        self._processes = processes

    def free(self) -> int:
        """Bytes that tensors may still take."""
        return psutil.virtual_memory().available // self._processes

    def peak_of(self, run: Callable[[], object]) -> int | None:
        """Bytes of tensors that were alive at once during a run, above what was there before it."""
        # Its own lines about starting and stopping would go to the user.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        with profile(use_cpu=True, profile_memory=True) as recorded:
            run()
        alive = peak = 0
        results: Any = recorded.kineto_results
        for event in sorted(
            (e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
        ):
            alive += event.nbytes()
            peak = max(peak, alive)
        return peak


class GpuMemory:
    """That of this process's GPU."""

    def free(self) -> int:
        """Bytes that tensors may still take: the device's, and what torch keeps without using
        it.
        """
        free, _ = torch.cuda.mem_get_info()
        return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())

    def peak_of(self, run: Callable[[], object]) -> int | None:
        """Bytes of tensors that were alive at once during a run, above what was there before it;
        None if it failed.
        """
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if not _fits(run):
            torch.cuda.empty_cache()  # after the exception, whose frames hold what was made
            return None
        return torch.cuda.max_memory_allocated() - before


def _fits(run: Callable[[], object]) -> bool:
    try:
        run()
        torch.cuda.synchronize()
    except RuntimeError as error:
        if is_out_of_memory(error):
            return False
        raise
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception tells of missing memory: torch's own, or that of a library beneath
    it.
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
    )
