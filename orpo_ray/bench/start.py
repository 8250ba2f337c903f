"""What a start costs: commands of four steps on the demo's base, compared with stock TRL.

CPU seconds of all processes of a command are compared, Ray's included. Seconds by the clock would
depend on other work on the machine. The sides run in turns, and the medians are reported.
"""

import os
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil
import yaml

from orpo_ray.errors import RunError
from orpo_ray.runs.console import Announce
from orpo_ray.runs.files import METRICS_FILE, RESULT_FILE
from orpo_ray.runs.lock import WORKERS_LOCK_FILE
from orpo_ray.runs.metrics import metric_by_step

STEPS, PAIRS_PER_STEP, EVAL_PAIRS = 4, 16, 16
_PAIRS_TO_PREPARE = 1024
_LOOK_S = 0.05
"""Seconds between two looks. At most so much CPU time of a process that ends is missed."""
_COMMAND = (sys.executable, "-m", "orpo_ray.cli.main")
_DEMO = files("orpo_ray") / "demo"
# With -P the script cannot import the files beside it as modules.
_STOCK = (sys.executable, "-P", str(Path(__file__).with_name("stock_run.py")))
_PACKAGES = ("ray", "torch", "transformers", "trl", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Phase:
    """A part of a command. It ends when `is_over` is true, which is checked at each look."""

    name: str
    is_over: Callable[["Watched"], bool]


@dataclass
class Watched:
    """A running command, with what it said and the CPU seconds of all its processes so far."""

    root: psutil.Popen
    heard: bytes = b""
    taken: dict[psutil.Process, float] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

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
        for process in family:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self.taken[process] = times.user + times.system
                self.names.add(process.name())


@dataclass(frozen=True)
class Cost:
    """What a command cost in all, and in each of its phases."""

    cpu_s: float
    wall_s: float
    phases: dict[str, dict[str, float]]


def bench_start(turns: int, announce: Announce) -> dict[str, Any]:
    """CPU seconds of a run of four steps, of a stock one, and of a search's second trial.

    The result also has the seconds by the clock in which 1,024 pairs are prepared. All numbers are
    medians over the turns.
    """
    found: dict[str, list[Cost]] = {"one_worker": [], "two_workers": [], "stock": []}
    second_trials, prepared = [], []
    with tempfile.TemporaryDirectory(prefix="orpo-ray-bench-") as name:
        folder = Path(name)
        _watch([*_COMMAND, "prepare", str(_write_config(folder, "pairs", 1))], [])
        for turn in range(turns):
            for side, costs in found.items():
                costs.append(_START[side](folder, f"{side}-{turn}"))
                announce(f"{side}, turn {turn + 1} of {turns}: {costs[-1].cpu_s:.1f} CPU s")
            second_trials.append(_second_trial(folder, f"search-{turn}"))
            announce(f"second trial, turn {turn + 1} of {turns}: {second_trials[-1]:.1f} CPU s")
            prepared.append(_prepare(folder, f"prepare-{turn}"))
            announce(f"prepare, turn {turn + 1} of {turns}: {prepared[-1]:.1f} s")
    medians = {f"{side}_cpu_s": _median(cost.cpu_s for cost in found[side]) for side in found}
    return {
        "name": "start",
        **medians,
        "second_trial_cpu_s": _median(second_trials),
        "prepare_wall_s": _median(prepared),
        "wall_s": {side: _median(cost.wall_s for cost in found[side]) for side in found},
        "phases": {side: _median_phases(found[side]) for side in ("one_worker", "two_workers")},
        "turns": turns,
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _median(values: Any) -> float:
    return float(statistics.median(values))


def _median_phases(costs: Sequence[Cost]) -> dict[str, dict[str, float]]:
    return {
        name: {unit: _median(cost.phases[name][unit] for cost in costs) for unit in units}
        for name, units in costs[0].phases.items()
    }


def _train(folder: Path, name: str, workers: int, phases: Callable[[Path], list[Phase]]) -> Cost:
    config = _write_config(folder, name, workers)
    return _watch([*_COMMAND, "train", str(config)], phases(folder / name))


def _phases_of_one_worker(run_dir: Path) -> list[Phase]:
    return [
        Phase("imports", lambda watched: watched.has_said("dtype ")),
        Phase("base", lambda watched: watched.has_said("attention in layout ")),
        Phase("first_step", lambda watched: _has_trained(run_dir)),
        Phase("end", lambda watched: False),
    ]


def _phases_of_two_workers(run_dir: Path) -> list[Phase]:
    return [
        Phase("interpreter", lambda watched: "raylet" in watched.names),
        Phase("ray", lambda watched: watched.has_said("starting 2 workers ")),
        Phase("workers_imports", lambda watched: (run_dir / WORKERS_LOCK_FILE).exists()),
        Phase("base", lambda watched: watched.has_said("attention in layout ")),
        Phase("first_step", lambda watched: _has_trained(run_dir)),
        Phase("end", lambda watched: False),
    ]


def _stock(folder: Path, name: str) -> Cost:
    sizes = map(str, (STEPS, PAIRS_PER_STEP, EVAL_PAIRS))
    return _watch([*_STOCK, str(folder / name), str(_DEMO), *sizes], [])


_START: Mapping[str, Callable[[Path, str], Cost]] = {
    "one_worker": lambda folder, name: _train(folder, name, 1, _phases_of_one_worker),
    "two_workers": lambda folder, name: _train(folder, name, 2, _phases_of_two_workers),
    "stock": _stock,
}


def _has_trained(run_dir: Path) -> bool:
    return (run_dir / METRICS_FILE).exists() and bool(metric_by_step(run_dir, "train/loss"))


def _second_trial(folder: Path, name: str) -> float:
    """CPU seconds from the end of a search's first trial to the first step of its second one."""
    rates = {"training.learning_rate": {"grid": [1.0e-4, 2.0e-4]}}
    search = {"space": rates, "searcher": "grid", "scheduler": "none"}
    # A worker takes the whole machine, so that the trials run one after the other.
    scale = {"workers": 1, "gpus_per_worker": 0, "cpus_per_worker": os.cpu_count()}
    config = _write_config(folder, name, 1, search=search, scale=scale)
    trials = folder / name / "search" / "trials"
    phases = [
        Phase("first", lambda watched: len(list(trials.glob(f"*/{RESULT_FILE}"))) == 1),
        Phase("second", lambda watched: sum(map(_has_trained, trials.glob("*"))) == 2),
        Phase("end", lambda watched: False),
    ]
    cost = _watch([*_COMMAND, "tune", str(config)], phases)
    return cost.phases["second"]["cpu_s"]


def _prepare(folder: Path, name: str) -> float:
    """Seconds by the clock in which a command prepares all pairs of the demo."""
    (folder / name).mkdir()
    config = _write_config(folder / name, name, 1, limit=_PAIRS_TO_PREPARE)
    return _watch([*_COMMAND, "prepare", str(config)], []).wall_s


def _write_config(
    folder: Path, name: str, workers: int, limit: int = STEPS * PAIRS_PER_STEP, **own: Any
) -> Path:
    settings = {
        "name": name,
        "storage": str(folder),
        "model": {"base": str(_DEMO / "base")},
        "adapter": {"r": 16, "alpha": 16},
        "data": {
            "train": [{"source": str(_DEMO / "train.jsonl"), "limit": limit}],
            "eval": [{"source": str(_DEMO / "h1.jsonl"), "limit": EVAL_PAIRS}],
            "max_length": 96,
            "max_prompt_length": 48,
        },
        "training": {
            "pairs_per_step": PAIRS_PER_STEP,
            "max_steps": STEPS,
            "eval_every": 1.0,
            "samples": 0,
            "checkpoint_every": 1.0,
        },
        "scale": {"workers": workers, "gpus_per_worker": 0, "deepspeed": "none"},
    } | own
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def _watch(command: Sequence[str], phases: Sequence[Phase]) -> Cost:
    """Run a command to its end. Raises RunError if it fails."""
    began = time.monotonic()
    root = psutil.Popen(
        command, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    watched, marks = Watched(root), [(0.0, 0.0)]
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
    return Cost(cpu_s, wall_s, costs)


def _listen(root: psutil.Popen, watched: Watched) -> None:
    """Read what the command has written to stderr since the last call."""
    watched.heard += root.stderr.read() or b""


def _environment() -> dict[str, str]:
    """Variables of a command: one thread a process, and a Ray of its own.

    Ray too gives a worker of one CPU one thread.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**inherited, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
