"""Runs a command and counts what all its processes take: CPU seconds, seconds, memory.

Seconds by the clock depend on other work on the machine, and CPU seconds hardly do.
"""

import os
import selectors
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from orpo_ray.errors import RunError

_LOOK_S = 0.05
"""Seconds between two looks. At most so much CPU time of a process that ends is missed."""


@dataclass(frozen=True)
class Phase:
    """A part of a command. It ends when `is_over` is true, which is checked at each look."""

    name: str
    is_over: Callable[["Watched"], bool]


@dataclass(kw_only=True)
class Watched:
    """A running command, with what it said and the CPU seconds of all its processes so far."""

    root: psutil.Popen
    heard: bytes = b""
    taken: dict[psutil.Process, float] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    peak_bytes: int = 0
    """The most resident memory of its processes at a look; pages that they share count twice."""

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all processes, with those that have ended."""
        return sum(self.taken.values())

    @property
    def said(self) -> list[str]:
        """The lines on stderr."""
        return self.heard.decode("utf-8", errors="replace").splitlines()

    def has_said(self, beginning: str) -> bool:
        """Whether a line of stderr has this beginning."""
        return any(line.startswith(beginning) for line in self.said)

    def look(self) -> None:
        """Note the CPU time of each process, also of those that lost their parent."""
        family = set(self.taken) | {self.root}
        with suppress(psutil.NoSuchProcess):
            family |= set(self.root.children(recursive=True))
        resident = 0
        for process in family:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self.taken[process] = times.user + times.system
                self.names.add(process.name())
                resident += process.memory_info().rss
        self.peak_bytes = max(self.peak_bytes, resident)


@dataclass(frozen=True)
class Cost:
    """What a command cost in all, and in each of its phases."""

    cpu_s: float
    wall_s: float
    peak_bytes: int
    phases: dict[str, dict[str, float]]


def watch(command: Sequence[str], phases: Sequence[Phase] = ()) -> Cost:
    """Run a command to its end. Raises RunError if it fails."""
    began = time.monotonic()
    root = psutil.Popen(
        command, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    watched, marks = Watched(root=root), [(0.0, 0.0)]
    with selectors.DefaultSelector() as ready:
        os.set_blocking(root.stderr.fileno(), False)
        ready.register(root.stderr, selectors.EVENT_READ)
        while root.poll() is None:
            if ready.select(_LOOK_S):
                _listen(root, watched)
                time.sleep(_LOOK_S)  # an ended stream is always ready, so `select` would not wait
            watched.look()
            while len(marks) <= len(phases) and phases[len(marks) - 1].is_over(watched):
                marks.append((watched.cpu_s, time.monotonic() - began))
    _listen(root, watched)
    if root.returncode:
        last = watched.said[-1] if watched.said else "it said nothing"
        raise RunError(f"a command of the benchmark ended with code {root.returncode}: {last}")
    marks.append((watched.cpu_s, time.monotonic() - began))
    cpu_s, wall_s = marks[-1]
    spans = zip(phases, marks, marks[1:], strict=False)
    costs = {
        phase.name: {"cpu_s": end[0] - begin[0], "wall_s": end[1] - begin[1]}
        for phase, begin, end in spans
    }
    return Cost(cpu_s, wall_s, watched.peak_bytes, costs)


def _listen(root: psutil.Popen, watched: Watched) -> None:
    """Read what the command has written to stderr since the last call."""
    watched.heard += root.stderr.read() or b""


def _environment() -> dict[str, str]:
    """Variables of a command: one thread a process, and a Ray of its own.

    Ray too gives a worker of one CPU one thread.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**inherited, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
