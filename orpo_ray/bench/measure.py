"""How sides of a benchmark are compared: in turns within one process, medians, and the memory of
one run apart.
"""

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
    """Seconds of every run in every turn; the order is turned round each time, so that a drift
    meets all alike.

    CPU time of the process on a CPU, which a busy machine does not stretch; the device's own clock
    on a GPU.
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
    """The median of how many times longer the first one took, turn by turn."""
    return statistics.median(one / other for one, other in zip(slower, faster, strict=True))


def relative_differences(
    stock: tuple[float, Tensor], ours: tuple[float, Tensor]
) -> tuple[float, float]:
    """How far our (loss, gradient as one vector) is from stock's, each relative to stock's."""
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
    """Bytes of tensors that were alive at once during a run, above what was there before it."""
    peak = (GpuMemory() if device == "cuda" else CpuMemory()).peak_of(run)
    if peak is None:
        raise ResourceError(
            "a step does not fit into the GPU's memory; take fewer or shorter pairs"
        )
    return peak
