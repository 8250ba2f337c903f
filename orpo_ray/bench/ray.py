"""What Ray costs a step: the same loop under Ray Train and under bare torch.distributed, in turns.

Both sides train the demo's model on two CPU workers. Both groups of processes exist at the same
time. All of one group is stopped while the other has its turn of a few seconds. So no Ray runs
beside the bare loop, and a change of the machine's speed affects both alike.

Whole steps are compared by the clock, as the runs report them: data, forward, backward, optimizer
and report. Start-up, evaluations and checkpoints are not part of a step.
"""

import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import yaml

from orpo_ray.errors import RunError
from orpo_ray.runs.console import Announce
from orpo_ray.runs.metrics import metric_by_step

WORKERS = 2
_WARM_UP_STEPS = 5
"""First steps of a run, in which caches fill and DeepSpeed makes its buffers."""
_CATCH_UP_S = 1.5
"""Start of a turn that is not compared.

The stop cut a step in two, and timers that expired meanwhile run now.
"""
_ENDLESS = 100_000
"""Steps of a run, which is ended long before."""
_POLL_S = 0.5
_LEAVE_S = 60.0
_COMMAND = (sys.executable, "-m", "orpo_ray.cli.main")
_PACKAGES = ("ray", "torch", "transformers", "deepspeed")


@dataclass(frozen=True)
class _Turn:
    """Means over the steps of one turn: seconds by the clock, and CPU seconds of the group."""

    wall: float
    cpu: float


def bench_ray(seconds: float, turns: int, starts: int, announce: Announce) -> dict[str, Any]:
    """Seconds of a step, bare and under Ray: medians over the turns of all starts.

    `ratio` is bare / Ray. `ratio_cpu` is the same for CPU seconds of all processes of a group. They
    are ratios of medians, because other work on a shared machine can make a turn half as long
    again. `error` is the standard error of the mean of the ratios of pairs of turns; such turns
    increase it.
    """
    taken: dict[str, list[_Turn]] = {"bare": [], "ray": []}
    with tempfile.TemporaryDirectory(prefix="orpo-ray-bench-") as folder:
        artifact = _prepare(_write_config(Path(folder), "prepare"))
        for number in range(starts):
            announce(f"start {number + 1} of {starts}")
            configs = {side: _write_config(Path(folder), f"{side}-{number}") for side in taken}
            _compare(configs, artifact, taken, seconds, turns=turns, announce=announce)
    bare, ray = (statistics.median(turn.wall for turn in taken[side]) for side in ("bare", "ray"))
    bare_cpu, ray_cpu = (
        statistics.median(turn.cpu for turn in taken[side]) for side in ("bare", "ray")
    )
    ratios = [b.wall / r.wall for b, r in zip(taken["bare"], taken["ray"], strict=True)]
    return {
        "name": "ray",
        "ratio": bare / ray,
        "error": statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else None,
        "ratio_cpu": bare_cpu / ray_cpu,
        "bare": bare,
        "ray": ray,
        "turns": {side: [turn.wall for turn in taken[side]] for side in taken},
        "workers": WORKERS,
        "starts": starts,
        "device": "cpu",
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _compare(
    configs: dict[str, Path],
    artifact: str,
    taken: dict[str, list[_Turn]],
    seconds: float,
    *,
    turns: int,
    announce: Announce,
) -> None:
    """Start both groups and add their turns to `taken`."""
    with ExitStack() as stack:
        groups: dict[str, _Group] = {}
        for side, start in (("bare", _start_bare), ("ray", _start_ray)):
            groups[side] = stack.enter_context(start(configs[side], artifact))
            groups[side].warm_up()
        for number in range(turns):
            # The order alternates, so that a drift of the machine's speed affects both alike.
            for side in groups if number % 2 == 0 else reversed(groups):
                taken[side].append(groups[side].take_turn(seconds))
            bare, ray = taken["bare"][-1], taken["ray"][-1]
            announce(f"turn {number + 1} of {turns}: {bare.wall:.4f} s bare, {ray.wall:.4f} s Ray")


def _write_config(folder: Path, name: str) -> Path:
    """The demo's model and pairs, with evaluation and checkpoint only at the ends."""
    demo = files("orpo_ray") / "demo"
    settings = {
        "name": name,
        "storage": str(folder),
        "model": {"base": str(demo / "base")},
        "data": {
            "train": [{"source": str(demo / "train.jsonl")}],
            "eval": [{"source": str(demo / "h1.jsonl"), "limit": 2 * WORKERS}],
            "max_length": 96,
            "max_prompt_length": 48,
        },
        "training": {
            "pairs_per_step": 16,
            "max_steps": _ENDLESS,
            "eval_every": 1.0,
            "samples": 0,
            "checkpoint_every": 1.0,
        },
        "scale": {
            "workers": WORKERS,
            "gpus_per_worker": 0,
            "deepspeed": {"stage": 2},
            "max_failures": 0,
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def _prepare(config: Path) -> str:
    """Prepare the pairs for all runs; returns their folder."""
    command = [*_COMMAND, "prepare", str(config), "--json"]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"the pairs of the benchmark could not be prepared: {done.stderr.strip()}")
    prepared: str = json.loads(done.stdout)["artifact"]
    return prepared


def _environment(**own: str) -> dict[str, str]:
    """Variables of a group: one thread a worker, and a Ray of its own.

    Ray too gives a worker of one CPU one thread. Only a Ray of its own can be stopped.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**inherited, **own, "OMP_NUM_THREADS": "1"}


def _start_ray(config: Path, artifact: str) -> "_Group":
    """A group under Ray Train. It finds the prepared pairs by itself."""
    return _Group(config, [[*_COMMAND, "train", str(config)]], [{}])


def _start_bare(config: Path, artifact: str) -> "_Group":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(WORKERS)}
    command = [sys.executable, "-m", "orpo_ray.bench.bare", str(config), artifact]
    return _Group(
        config,
        [command] * WORKERS,
        [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(WORKERS)],
    )


class _Group:
    """All processes of one run. They are stopped between turns, and end with the `with` block."""

    def __init__(
        self, config: Path, commands: list[list[str]], environments: list[dict[str, str]]
    ) -> None:
        self._run_dir = config.with_suffix("")
        self._log = config.with_suffix(".log")
        self._stopped: list[psutil.Process] = []
        with self._log.open("w") as log:
            self._started = [
                psutil.Popen(command, env=_environment(**own), stdout=log, stderr=log)
                for command, own in zip(commands, environments, strict=True)
            ]

    def warm_up(self) -> None:
        """Run until the first steps are done, however long the start takes."""
        while len(self._seconds()) < _WARM_UP_STEPS:
            self._require_life()
            time.sleep(_POLL_S)
        self._pause()

    def take_turn(self, seconds: float) -> _Turn:
        """Run for some seconds.

        Nothing is measured meanwhile, since that would take time from the workers.
        """
        self._send(signal.SIGCONT, self._stopped)
        time.sleep(_CATCH_UP_S)
        before, cpu_before = len(self._seconds()), self._cpu_seconds()
        time.sleep(seconds)
        cpu_after = self._cpu_seconds()
        self._pause()
        self._require_life()
        steps = self._seconds()[before:]
        if not steps:
            raise RunError(f"no step ended within {seconds:g} s; give each turn more seconds")
        lived = cpu_before.keys() & cpu_after.keys()
        cpu = sum(cpu_after[process] - cpu_before[process] for process in lived)
        return _Turn(statistics.mean(steps), cpu / len(steps))

    def _pause(self) -> None:
        self._stopped = self._processes()
        self._send(signal.SIGSTOP, self._stopped)

    def _seconds(self) -> list[float]:
        """Seconds of each step so far."""
        return list(metric_by_step(self._run_dir, "train/seconds").values())

    def _cpu_seconds(self) -> dict[psutil.Process, float]:
        taken = {}
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                taken[process] = times.user + times.system
        return taken

    def _processes(self) -> list[psutil.Process]:
        found = list[psutil.Process](self._started)
        for root in self._started:
            with suppress(psutil.NoSuchProcess):
                found += root.children(recursive=True)
        return found

    def _send(self, number: signal.Signals, processes: list[psutil.Process]) -> None:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _require_life(self) -> None:
        if any(process.poll() is not None for process in self._started):
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RunError(
                f"a run of the benchmark ended early: {said[-1] if said else 'it said nothing'}"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        # `_stopped` also has processes whose parent ended while they were stopped.
        family = [*self._stopped, *self._processes()]
        self._send(signal.SIGCONT, family)
        for process in self._started:
            if process.poll() is None:
                process.terminate()
        psutil.wait_procs(self._started, _LEAVE_S)
        self._send(signal.SIGKILL, family)
        psutil.wait_procs(self._started)
