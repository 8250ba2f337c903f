"""Compares the sides of a benchmark: time in turns within one process, and memory of one run."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from orpo_ray.errors import ResourceError
from orpo_ray.training.memory import CpuMemory, GpuMemory

Run = Callable[[], Any]


def time_in_turns(runs: Sequence[Run], turns: int, device: str) -> list[list[float]]:
    """Seconds of every run in every turn.

    The order is reversed each turn, so that a drift of the machine's speed affects all runs alike.
    On a CPU the seconds are CPU time of the process, which other work does not stretch. On a GPU
    they are the device's own.
    """
    taken: list[list[float]] = [[] for _ in runs]
    clock = _time_on_gpu if device == "cuda" else _time_on_cpu
    for run in runs:
        run()
    for turn in range(turns):
        order = range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs)))
        for number in order:
            taken[number].append(clock(runs[number]))
    return taken


def ratio_of(slower: Sequence[float], faster: Sequence[float]) -> float:
    """How many times longer the first one took: the median over turns."""
    return statistics.median(one / other for one, other in zip(slower, faster, strict=True))


def relative_differences(
    stock: tuple[float, Tensor], ours: tuple[float, Tensor]
) -> tuple[float, float]:
    """Relative differences of our loss and gradient vector from stock's."""
    (loss, gradient), (our_loss, our_gradient) = stock, ours
    return abs(our_loss - loss) / abs(loss), float(
        (our_gradient - gradient).norm() / gradient.norm()
    )


def _time_on_cpu(run: Run) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def _time_on_gpu(run: Run) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def peak_memory(run: Run, device: str) -> int:
    """Most bytes of tensors alive during a run, without those from before the run."""
    peak = (GpuMemory() if device == "cuda" else CpuMemory()).peak_of(run)
    if peak is None:
        raise ResourceError(
            "a step does not fit into the GPU's memory; take fewer or shorter pairs"
        )
    return peak
