"""How many threads a process computes with that trains on a CPU.

One for each of its cores is the most. On a machine with other work, threads wait for one another,
and fewer are faster. So it is tried: the forward pass of some pairs, with ever fewer threads.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from orpo_ray.runs.console import Announce
from orpo_ray.training.set_threads import VARIABLE
from orpo_ray.training.world import World

SAMPLE_TOKENS = 512
"""A pack of so many tokens is computed, or the longest pair alone."""
_TURNS = 3
_LONG = 2.0
"""Seconds after which no further turn begins."""
_GAIN = 1.1
"""Twice the threads are taken if they are so many times faster."""
Clock = Callable[[], float]


def are_worth_it(more: Sequence[float], fewer: Sequence[float]) -> bool:
    """Whether more threads are clearly faster, from the seconds of the same work."""
    return statistics.median(fewer) > _GAIN * statistics.median(more)


def settle_threads(
    recorded: int | None,
    work: Callable[[], object],
    world: World,
    announce: Announce,
    clock: Clock,
) -> int:
    """Have the processes of `world` compute with the best number of threads, the same in each.

    They try at the same time, since that is how they train. A resumed run takes the number
    `recorded` at its start, so that its sums are the same. Returns what is to be recorded.
    """
    cores = torch.get_num_threads()
    if recorded is not None:
        count = min(recorded, cores)
        if count < recorded:
            announce(f"{_told(count, world)}: the run began with {recorded}, which are not here")
        torch.set_num_threads(count)
        return recorded
    count = min(world.gather(_fastest(cores, work, clock)))
    torch.set_num_threads(count)
    if cores > 1:
        found = "more are no faster on this machine now" if count < cores else "one for each core"
        announce(f"{_told(count, world)}: {found} ({VARIABLE} sets them)")
    return count


def _told(count: int, world: World) -> str:
    each = " each" if world.size > 1 else ""
    return f"{count} thread{each}" if count == 1 else f"{count} threads{each}"


@contextmanager
def threads_restored() -> Iterator[None]:
    """Afterwards the process computes with as many threads as before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fastest(cores: int, work: Callable[[], object], clock: Clock) -> int:
    """The number of threads, halved from all cores as long as that costs little."""
    count = cores
    if cores > 1:
        work()  # the first time costs more
    while count > 1:
        more, fewer = time_in_turns((count, count // 2), work, clock)
        if are_worth_it(more, fewer):
            return count
        count //= 2
    return count


def time_in_turns(
    counts: Sequence[int], work: Callable[[], object], clock: Clock
) -> list[list[float]]:
    """Seconds of the work with each number of threads."""
    taken: list[list[float]] = [[] for _ in counts]
    begin = clock()
    for _ in range(_TURNS):
        for count, seconds in zip(counts, taken, strict=True):
            torch.set_num_threads(count)
            started = clock()
            work()
            seconds.append(clock() - started)
        if clock() - begin > _LONG:
            break
    return taken
