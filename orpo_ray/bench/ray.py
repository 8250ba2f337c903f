"""What Ray costs a step: the same training loop under Ray Train and under bare torch.distributed, in turns.

Both train the demo's model on two CPU workers. Both groups of processes live side by side, and all of one group is
stopped while the other has its turn of a few seconds, so that no Ray runs beside the bare loop and a machine whose
speed wanders meets both alike. Compared are whole steps by the clock, as the runs themselves report them: data,
forward, backward, optimizer and report. Start-up, evaluations and checkpoints are not part of a step.
"""

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import yaml

from orpo_ray.errors import RunError
from orpo_ray.training.record import metric_by_step

WORKERS = 2
_WARM_UP_STEPS = 5
"""Steps at the start of a run in which caches fill and DeepSpeed makes its buffers."""
_CATCH_UP_STEPS = 6
"""Steps at the start of a turn that are not compared: the one that was cut in two, and those in which timers that
fell due meanwhile are served."""
_POLL_S = 0.1
_COMMAND = (sys.executable, "-m", "orpo_ray.cli.main")
_PACKAGES = ("ray", "torch", "transformers", "deepspeed")

Announce = Callable[[str], None]


def bench_ray(steps: int, turns: int, announce: Announce) -> dict[str, Any]:
    """Seconds of a step, bare and under Ray: the mean of each turn, the median of all turns.

    `ratio` is bare / Ray, `ratio_cpu` the same of the CPU seconds that all processes of a group took in its turns.
    """
    with tempfile.TemporaryDirectory(prefix="orpo-ray-bench-") as folder, ExitStack() as stack:
        # What is stopped too late in a turn goes on for a step or two more.
        enough = _WARM_UP_STEPS + turns * (_CATCH_UP_STEPS + steps + 3)
        artifact = _prepare(_write_config(Path(folder), "prepare", enough))
        groups: dict[str, _Group] = {}
        for side, start in (("bare", _start_bare), ("ray", _start_ray)):
            announce(f"starting the {side} workers")
            groups[side] = stack.enter_context(start(_write_config(Path(folder), side, enough), artifact))
            groups[side].take_turn(_WARM_UP_STEPS)
        wall: dict[str, list[float]] = {side: [] for side in groups}
        cpu: dict[str, list[float]] = {side: [] for side in groups}
        for number in range(turns):
            for side in groups if number % 2 == 0 else reversed(groups):
                seconds, cpu_seconds = groups[side].take_turn(_CATCH_UP_STEPS + steps)
                wall[side].append(statistics.mean(seconds[_CATCH_UP_STEPS:]))
                cpu[side].append(cpu_seconds / len(seconds))
            announce(f"turn {number + 1} of {turns}: {wall['bare'][-1]:.4f} s bare, {wall['ray'][-1]:.4f} s Ray")
    bare, ray = (statistics.median(wall[side]) for side in ("bare", "ray"))
    return {
        "name": "ray",
        "ratio": bare / ray,
        "ratio_cpu": statistics.median(cpu["bare"]) / statistics.median(cpu["ray"]),
        "bare": bare,
        "ray": ray,
        "turns": wall,
        "turns_cpu": cpu,
        "workers": WORKERS,
        "steps": steps,
        "device": "cpu",
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _write_config(folder: Path, name: str, steps: int) -> Path:
    """The demo's model and pairs; one evaluation at either end, one checkpoint at the last step."""
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
            "max_steps": steps,
            "eval_every": 1.0,
            "checkpoint_every": 1.0,
        },
        "scale": {"workers": WORKERS, "gpus_per_worker": 0, "deepspeed": {"stage": 2}},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def _prepare(config: Path) -> str:
    """The folder of the prepared pairs, so that no run has to prepare them."""
    command = [*_COMMAND, "prepare", str(config), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"the pairs of the benchmark could not be prepared: {done.stderr.strip()}")
    prepared: str = json.loads(done.stdout)["artifact"]
    return prepared


def _start_ray(config: Path, artifact: str) -> "_Group":
    return _Group(config, [[*_COMMAND, "train", str(config)]], [{}])


def _start_bare(config: Path, artifact: str) -> "_Group":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(WORKERS)}
    command = [sys.executable, "-m", "orpo_ray.bench.bare", str(config), artifact]
    return _Group(
        config, [command] * WORKERS, [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(WORKERS)]
    )


class _Group:
    """All processes of one run, stopped but for its turns; ended with the `with` block."""

    def __init__(self, config: Path, commands: list[list[str]], environments: list[dict[str, str]]) -> None:
        self._run_dir = config.with_suffix("")
        self._log = config.with_suffix(".log")
        with self._log.open("w") as log:
            self._started = [
                # One thread a worker, which is also what Ray gives a worker of one CPU.
                psutil.Popen(command, env={**os.environ, **own, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
                for command, own in zip(commands, environments, strict=True)
            ]

    def take_turn(self, steps: int) -> tuple[list[float], float]:
        """Run until `steps` more are done: the seconds of each, and the CPU seconds of all processes together."""
        before, cpu_before = len(self._seconds()), self._cpu_seconds()
        self._send(signal.SIGCONT)
        while len(self._seconds()) < before + steps:
            self._require_life()
            time.sleep(_POLL_S)
        self._send(signal.SIGSTOP)
        return self._seconds()[before:], self._cpu_seconds() - cpu_before

    def _seconds(self) -> list[float]:
        """Seconds of all steps so far."""
        return list(metric_by_step(self._run_dir, "train/seconds").values())

    def _cpu_seconds(self) -> float:
        taken = 0.0
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                taken += times.user + times.system
        return taken

    def _processes(self) -> list[psutil.Process]:
        found = list[psutil.Process](self._started)
        for root in self._started:
            with suppress(psutil.NoSuchProcess):
                found += root.children(recursive=True)
        return found

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _require_life(self) -> None:
        if any(process.poll() is not None for process in self._started):
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RunError(f"a run of the benchmark ended early: {said[-1] if said else 'it said nothing'}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._send(signal.SIGCONT)
        for process in self._started:
            if process.poll() is None:
                process.terminate()
        for process in self._started:
            process.wait()
