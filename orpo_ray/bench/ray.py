"""What Ray costs a step: the same training loop under Ray Train and under bare torch.distributed, in turns.

Both train the demo's model on two CPU workers, each run in fresh processes, so that no Ray is alive while the bare
loop runs. Compared are whole steps by the clock, as the runs themselves report them: data, forward, backward,
optimizer and report. Start-up, evaluations and checkpoints are not part of a step.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from orpo_ray.errors import RunError
from orpo_ray.training.record import METRICS_FILE, metric_by_step

WORKERS = 2
_WARM_UP_STEPS = 5
"""Steps at the start of a run in which caches fill and DeepSpeed makes its buffers."""
_POLL_S = 0.2
_PACKAGES = ("ray", "torch", "transformers", "deepspeed")

Announce = Callable[[str], None]


def bench_ray(steps: int, rounds: int, announce: Announce) -> dict[str, Any]:
    """Median seconds of a step, bare and under Ray, over all rounds; `ratio` is bare / Ray."""
    with tempfile.TemporaryDirectory(prefix="orpo-ray-bench-") as folder:
        artifact = _prepare(_write_config(Path(folder), "prepare", steps))
        taken: dict[str, list[list[float]]] = {"bare": [], "ray": []}
        for number in range(rounds):
            # Back and forth, so that a drift of the machine's speed meets both alike.
            for side in ("bare", "ray") if number % 2 == 0 else ("ray", "bare"):
                config = _write_config(Path(folder), f"{side}-{number}", steps)
                _run_bare(config, artifact) if side == "bare" else _run(["train", str(config)])
                taken[side].append(_step_seconds(Path(folder) / f"{side}-{number}"))
                announce(f"round {number + 1} of {rounds}, {side}: {statistics.median(taken[side][-1]):.4f} s a step")
    pooled = {side: [seconds for run in runs for seconds in run] for side, runs in taken.items()}
    bare, ray = (statistics.median(pooled[side]) for side in ("bare", "ray"))
    return {
        "name": "ray",
        "ratio": bare / ray,
        "bare": bare,
        "ray": ray,
        "rounds": {side: [statistics.median(run) for run in runs] for side, runs in taken.items()},
        "workers": WORKERS,
        "steps": len(pooled["ray"]),
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
            "max_steps": steps + _WARM_UP_STEPS,
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
    prepared: str = json.loads(_run(["prepare", str(config), "--json"]))["artifact"]
    return prepared


def _run(arguments: list[str]) -> str:
    return _run_together([[sys.executable, "-m", "orpo_ray.cli.main", *arguments]], [{}])


def _run_bare(config: Path, artifact: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(WORKERS)}
    command = [sys.executable, "-m", "orpo_ray.bench.bare", str(config), artifact]
    _run_together([command] * WORKERS, [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(WORKERS)])


def _run_together(commands: list[list[str]], environments: list[dict[str, str]]) -> str:
    """What the first command printed. Raises RunError where one fails, and ends the others then."""
    with ExitStack() as stack:
        # Files, since nobody reads while they run.
        spoken = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        complaints = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        processes = [
            # One thread a worker, which is also what Ray gives a worker of one CPU.
            subprocess.Popen(command, env={**os.environ, **own, "OMP_NUM_THREADS": "1"}, stdout=out, stderr=err)
            for command, own, out, err in zip(commands, environments, spoken, complaints, strict=True)
        ]
        try:
            while any(process.poll() is None for process in processes):
                if any(process.poll() for process in processes):
                    break
                time.sleep(_POLL_S)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.terminate()
                process.wait()
        for process, file in zip(processes, complaints, strict=True):
            if process.returncode > 0:
                file.seek(0)
                raise RunError(f"a run of the benchmark failed: {file.read().strip().splitlines()[-1:]}")
        spoken[0].seek(0)
        return spoken[0].read()


def _step_seconds(run_dir: Path) -> list[float]:
    """Seconds of the steps after the warm-up."""
    seconds = metric_by_step(run_dir, "train/seconds")
    steady = [taken for step, taken in seconds.items() if step > _WARM_UP_STEPS]
    if not steady:
        raise RunError(f"{run_dir / METRICS_FILE}: no step to compare")
    return steady
