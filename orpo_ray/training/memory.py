"""The memory of this process: how much is free, how much a function takes, what is kept."""

import ctypes
import os
import re
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.autograd.profiler import profile

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE
)

# Numbers of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEEPS = {
    # Blocks up to this size are in a heap. Larger ones go back to the system when they are freed.
    # It comes first: if it is refused, the others would only switch off malloc's own adjustment.
    _MMAP_THRESHOLD: 2**30,
    _TRIM_THRESHOLD: 2**30,  # an unused end of a heap is kept up to this size
    _TOP_PAD: 64 * 2**20,  # as large as a thread's largest heap: malloc keeps an empty heap, too
}

# By itself malloc puts ever larger blocks into a heap, whose holes stay with the process.
_GIVES_BACK = {_MMAP_THRESHOLD: 2**20}


def keep_freed_memory() -> None:
    """Have malloc keep freed memory, which saves thousands of page faults in each step on a CPU.

    Without it, some runs have these faults and others do not. The whole process keeps up to a GiB
    of what it has freed.
    """
    _tune_malloc(_KEEPS)


def give_back_freed_memory() -> None:
    """Have malloc give blocks of a MiB and more back to the system as soon as they are freed.

    For work on one weight after the other: without it, a process keeps several times what it uses.
    """
    _tune_malloc(_GIVES_BACK)


def _tune_malloc(options: Mapping[int, int]) -> None:
    """Set options of malloc for the whole process.

    Nothing is changed if the C library is not glibc, if it refuses, or if the user has tuned it
    (`MALLOC_...`, `GLIBC_TUNABLES`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if mallopt is None or tuned or any(name.startswith("MALLOC_") for name in os.environ):
        return
    for option, value in options.items():
        if not mallopt(option, value):
            return


def used_memory(device: str) -> int:
    """The bytes that this process uses now of its GPU, or of the machine's memory."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return int(psutil.Process().memory_info().rss)


def peak_memory(device: str) -> int:
    """The most bytes that this process has used of its GPU, or of the machine's memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class CpuMemory:
    """The memory of the machine, shared equally by the processes of a run on it."""

    def __init__(self, processes: int = 1) -> None:
        self._processes = processes

    def free(self) -> int:
        """Bytes that tensors may still take."""
        return psutil.virtual_memory().available // self._processes

    def peak_of(self, run: Callable[[], object]) -> int | None:
        """The most bytes of tensors that `run` holds at once, in addition to those before."""
        # Otherwise the profiler prints lines about its start and stop.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        with profile(use_cpu=True, profile_memory=True) as recorded:
            run()
        alive = peak = 0
        results: Any = recorded.kineto_results
        changes = [event for event in results.events() if event.name() == "[memory]"]
        for event in sorted(changes, key=lambda event: event.start_ns()):
            alive += event.nbytes()
            peak = max(peak, alive)
        return peak


@dataclass(frozen=True)
class LimitedMemory:
    """A memory of which this process uses no more than `limit` bytes. `used` says how many it does.

    `whole` is the memory itself.
    """

    whole: "CpuMemory | GpuMemory"
    limit: int
    used: Callable[[], int]

    def free(self) -> int:
        """Bytes that tensors may still take; less than 0 if the limit is exceeded already."""
        return min(self.whole.free(), self.limit - self.used())

    def peak_of(self, run: Callable[[], object]) -> int | None:
        """The most bytes that `run` takes, besides those before it; None if that is too much."""
        free = self.free()
        peak = self.whole.peak_of(run)
        return peak if peak is not None and peak <= free else None


class GpuMemory:
    """The memory of this process's GPU."""

    def free(self) -> int:
        """Bytes that tensors may still take.

        They are the free bytes of the device, and those that torch holds without using them.
        """
        free, _ = torch.cuda.mem_get_info()
        return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())

    def peak_of(self, run: Callable[[], object]) -> int | None:
        """The most bytes of tensors that `run` holds at once, in addition to those before.

        None if memory runs out.
        """
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if not _fits(run):
            torch.cuda.empty_cache()  # only now: the exception's frames held the tensors
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
    """Whether an exception says that memory ran out, in torch or in a library that torch calls."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
    )
