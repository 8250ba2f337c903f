"""What a search saves: a full grid of 16 trials compared with 12 drawn trials that may end early.

Both are whole searches on the demo by the real command, one after the other. They cover the same
box of lambdas and learning rates, with the same pairs and the same 512 held-out pairs. The harder
h2 and h3 are among these. Both choose by the held-out margin: several trials reach an accuracy of
1.000, and only their margins tell them apart.
"""

import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from orpo_ray.errors import RunError
from orpo_ray.runs.console import Announce

_LAMBDAS = (0.1, 0.27, 0.74, 2.0)
_RATES = (3.0e-5, 1.4e-4, 6.5e-4, 3.0e-3)
_TRIALS = {"grid": len(_LAMBDAS) * len(_RATES), "search": 12}
"""The Gaussian process needs fewer trials than a grid has points."""
_STEPS = 50
_SPACES = {
    "grid": {
        "objective.lambda": {"grid": list(_LAMBDAS)},
        "training.learning_rate": {"grid": list(_RATES)},
    },
    "search": {
        "objective.lambda": {"loguniform": [_LAMBDAS[0], _LAMBDAS[-1]]},
        "training.learning_rate": {"loguniform": [_RATES[0], _RATES[-1]]},
    },
}
_METHODS: dict[str, dict[str, Any]] = {
    "grid": {"searcher": "grid", "scheduler": "none", "try_given": False},
    "search": {"trials": _TRIALS["search"]},
}
_METRIC = "eval/margin"
_COMMAND = (sys.executable, "-m", "orpo_ray.cli.main", "tune")
_PACKAGES = ("ray", "optuna", "torch", "transformers")


def bench_search(seed: int, announce: Announce) -> dict[str, Any]:
    """The best trial by held-out margin, and all trained steps, of a grid and of a search.

    `trial_steps` count every optimizer step of every trial, also steps after the last evaluation.
    `seed` sets the trials' data order and first adapters, and the search's draws.
    """
    found: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="orpo-ray-bench-") as folder:
        for side in _METHODS:
            announce(f"{side}: {_TRIALS[side]} trials of {_STEPS} steps")
            started = time.monotonic()
            found[side] = _tune(_write_config(Path(folder), side, seed))
            seconds[side] = time.monotonic() - started
    best = {side: search["outcome"]["metrics"] for side, search in found.items()}
    steps = {side: search["outcome"]["trial_steps"] for side, search in found.items()}
    return {
        "name": "search",
        "metric": _METRIC,
        "best_grid": best["grid"]["eval/accuracy"],
        "best_search": best["search"]["eval/accuracy"],
        "margin_grid": best["grid"]["eval/margin"],
        "margin_search": best["search"]["eval/margin"],
        "trial_steps_grid": steps["grid"],
        "trial_steps_search": steps["search"],
        "ratio": steps["search"] / steps["grid"],
        "grace": found["search"]["settings"]["grace"],
        "eta": found["search"]["settings"]["eta"],
        "values": {side: search["outcome"]["values"] for side, search in found.items()},
        "trials": {
            side: [_short(trial) for trial in search["trials"]] for side, search in found.items()
        },
        "pairs": found["grid"]["pairs"],
        "seed": seed,
        "seconds": seconds,
        "device": "cpu",
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _write_config(folder: Path, side: str, seed: int) -> Path:
    demo = files("orpo_ray") / "demo"
    settings = {
        "name": side,
        "storage": str(folder),
        "model": {"base": str(demo / "base")},
        "adapter": {"r": 16, "alpha": 32},
        "objective": {"kind": "orpo", "lambda": _LAMBDAS[0]},
        "data": {
            "train": [{"source": str(demo / "train.jsonl")}],
            "eval": [{"source": str(demo / f"{name}.jsonl")} for name in ("h1", "h2", "h3")],
            "max_length": 96,
            "max_prompt_length": 48,
        },
        "training": {
            "pairs_per_step": 16,
            "max_steps": _STEPS,
            "eval_every": 0.2,
            "checkpoint_every": 1.0,
            "seed": seed,
        },
        "scale": {"workers": 1, "gpus_per_worker": 0},
        "search": {"metric": _METRIC, "space": _SPACES[side], **_METHODS[side]},
    }
    path = folder / f"{side}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def _tune(config: Path) -> dict[str, Any]:
    """The result of `orpo-ray tune CONFIG --json`, whose progress goes to stderr."""
    done = subprocess.run(
        [*_COMMAND, str(config), "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RunError(
            f"orpo-ray tune {config.name} ended with exit code {done.returncode}; see above"
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _short(trial: dict[str, Any]) -> dict[str, Any]:
    last = trial["evaluations"][-1] if trial["evaluations"] else {}
    numbers = {name: last.get(f"eval/{name}") for name in ("accuracy", "margin", "nll")}
    return {**trial["values"], **numbers, "steps": trial["steps"], "state": trial["state"]}
