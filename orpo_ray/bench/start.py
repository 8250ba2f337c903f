"""What a start costs: commands of four steps on the demo's base, compared with stock TRL.

CPU seconds of all processes of a command are compared, Ray's included. Seconds by the clock would
depend on other work on the machine. The sides run in turns, and the medians are reported.
"""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from orpo_ray.bench.watch import Cost, Phase, watch
from orpo_ray.runs.console import Announce
from orpo_ray.runs.files import METRICS_FILE, RESULT_FILE
from orpo_ray.runs.lock import WORKERS_LOCK_FILE
from orpo_ray.runs.metrics import metric_by_step

STEPS, PAIRS_PER_STEP, EVAL_PAIRS = 4, 16, 16
_PAIRS_TO_PREPARE = 1024
COMMAND = (sys.executable, "-m", "orpo_ray.cli.main")
_DEMO = files("orpo_ray") / "demo"
# With -P the script cannot import the files beside it as modules.
STOCK = (sys.executable, "-P", str(Path(__file__).with_name("stock_train.py")))
_PACKAGES = ("ray", "torch", "transformers", "trl", "peft", "bitsandbytes")


def bench_start(turns: int, announce: Announce) -> dict[str, Any]:
    """CPU seconds of a run of four steps, of a stock one, and of a search's second trial.

    The result also has the seconds by the clock in which 1,024 pairs are prepared. All numbers are
    medians over the turns.
    """
    found: dict[str, list[Cost]] = {"one_worker": [], "two_workers": [], "stock": []}
    second_trials, prepared = [], []
    with tempfile.TemporaryDirectory(prefix="orpo-ray-bench-") as name:
        folder = Path(name)
        watch([*COMMAND, "prepare", str(_write_config(folder, "pairs", 1))])
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
    return watch([*COMMAND, "train", str(config)], phases(folder / name))


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
    settings = {
        "folder": str(folder / name),
        "objective": "orpo",
        "base": str(_DEMO / "base"),
        "quantization": "nf4",
        "train": str(_DEMO / "train.jsonl"),
        "eval": str(_DEMO / "h1.jsonl"),
        "pairs": STEPS * PAIRS_PER_STEP,
        "eval_pairs": EVAL_PAIRS,
        "steps": STEPS,
        "micro_batch": PAIRS_PER_STEP,
        "eval_batch": EVAL_PAIRS,
        "accumulation": 1,
        "max_length": 96,
        "beta": 0.1,
        "learning_rate": 1.0e-4,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return watch([*STOCK, str(path)])


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
    cost = watch([*COMMAND, "tune", str(config)], phases)
    return cost.phases["second"]["cpu_s"]


def _prepare(folder: Path, name: str) -> float:
    """Seconds by the clock in which a command prepares all pairs of the demo."""
    (folder / name).mkdir()
    config = _write_config(folder / name, name, 1, limit=_PAIRS_TO_PREPARE)
    return watch([*COMMAND, "prepare", str(config)]).wall_s


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
