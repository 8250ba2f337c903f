"""Folders as runs leave them, written by hand, so that pages can be made without training."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from support import run_config, settings

from orpo_ray.config import RunConfig, build, dump
from orpo_ray.runs.files import CONFIG_FILE, METRICS_FILE, RUN_FILE, SAMPLES_FILE, SEARCH_FILE
from orpo_ray.runs.run import Run
from orpo_ray.runs.scores import PairScores, scores_file, write_scores
from orpo_ray.runs.search import Found, Search, Trial

HOSTILE = (
    "<script>window.stolen = 1</script></script>]]>\u2028<img src=x onerror=alert(1)>{{ 7 * 7 }}"
)
LONG_WORD = "w" * 600
HELD_OUT = 64


def lines_of(steps: int, every: int) -> list[dict[str, float]]:
    """The reports of a run that learns, with an evaluation each `every` steps."""
    lines = []
    for step in range(steps + 1):
        part = step / steps
        if step:
            wave = 0.1 * math.sin(step)
            lines.append(
                {
                    "step": step,
                    "train/loss": 2 - part + wave,
                    "train/nll": 1 - part / 5 + wave,
                    "train/accuracy": 0.5 + part / 4,
                    "train/margin": part + wave,
                    "train/chosen_logp": -1 + part / 5 + wave,
                    "train/rejected_logp": -1 - part + wave,
                    "train/log_odds_ratio": part + wave,
                    "train/preference_share": 0.3,
                    "train/learning_rate": 1e-4 * (1 - part),
                    "train/grad_norm": 1 + abs(wave),
                    "train/seconds": 0.5,
                    "train/pairs_per_second": 16.0 + wave,
                    "train/memory_bytes": 8e9 + step,
                }
            )
        if step % every == 0:
            held = {"accuracy": 0.5 + part / 4, "margin": part, "nll": 1 - part / 5}
            held |= {"chosen_logp": -1 + part / 5, "rejected_logp": -1 - part}
            lines.append({"step": step, **{f"eval/{name}": each for name, each in held.items()}})
    return lines


def write_run(
    storage: Path | str,
    name: str = "run",
    lines: Iterable[Mapping[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
    samples: Iterable[Mapping[str, Any]] = (),
) -> Run:
    """A run that is not finished, with what is given."""
    config = build(RunConfig, {**settings(Path(), name), "storage": str(storage)}, {(): "tests"})
    return fill(Run(config), lines, facts, samples)


def fill(
    run: Run,
    lines: Iterable[Mapping[str, Any]] = (),
    facts: Mapping[str, Any] | None = None,
    samples: Iterable[Mapping[str, Any]] = (),
) -> Run:
    """Make the folder of a run with what is given."""
    run.folder.mkdir(parents=True, exist_ok=True)
    _write_json(run.path(CONFIG_FILE), dump(run.config))
    _write_json(run.path(RUN_FILE), {**(facts or {})})
    _write_lines(run.path(METRICS_FILE), lines)
    if samples:
        _write_lines(run.path(SAMPLES_FILE), samples)
    return run


def scores_of(correct: int, pairs: int = HELD_OUT, chosen: float = -8.0) -> PairScores:
    """The scores of pairs with ten tokens an answer, of which so many are right."""
    right = np.arange(pairs) < correct
    tokens = np.full(pairs, 10)
    spread = np.linspace(-0.5, 0.5, pairs)
    return PairScores(
        chosen=chosen + spread,
        rejected=np.where(right, chosen - 2, chosen + 2) + spread,
        chosen_tokens=tokens,
        rejected_tokens=tokens,
    )


def keep_scores(run: Run, step: int, scores: PairScores) -> None:
    """Keep the scores of an evaluation where the run keeps them."""
    write_scores(scores_file(run.path("evaluations"), step), scores)


def search_config(storage: Path) -> RunConfig:
    """The settings of a search in a run's folder."""
    space = {"objective.lambda": {"loguniform": [0.1, 2.0]}}
    space |= {"training.learning_rate": {"loguniform": [1e-4, 1e-2]}}
    return run_config(storage, "run/search", search={"trials": 9, "space": space})


def write_search(storage: Path) -> tuple[Path, Search]:
    """A finished search of nine trials: one failed, and those of a small rate were given up."""
    config = search_config(storage)
    assert config.search is not None
    trials = [_trial(number) for number in range(9)]
    trials[8] = Trial(number=8, run="run/search/trials/008", values=trials[8].values)
    trials[8].state, trials[8].error = "failed", f"no memory {HOSTILE}"
    best = trials[7]
    search = Search(
        name="run/search",
        settings=dump(config.search),
        trial_count=9,
        pairs=HELD_OUT,
        trials=trials,
    )
    search.status = "finished"
    search.outcome = Found(
        best=7,
        values=best.values,
        metrics=best.last,
        adapter="adapter",
        config="best.yaml",
        pareto=[{"trial": 7, "values": best.values, "accuracy": 0.9, "nll": 0.5, "margin": 1.0}],
        answers=[{"prompt": HOSTILE, "base": "no", "trial 7": HOSTILE}],
        trial_steps=100,
        reading=["Trial 7 is best."],
    )
    folder = config.run_dir
    folder.mkdir(parents=True)
    _write_json(folder / CONFIG_FILE, dump(config))
    _write_json(folder / SEARCH_FILE, search.to_json())
    return folder, search


def _trial(number: int) -> Trial:
    rate = 1e-4 * 10 ** (number / 4)
    values = {"objective.lambda": 0.1 + 0.2 * (number % 3), "training.learning_rate": rate}
    trial = Trial(number=number, run=f"run/search/trials/{number:03}", values=values)
    ends = 20 if number > 3 else 10
    for step in range(0, ends + 1, 5):
        gain = step / 20 * number / 10
        numbers = {"accuracy": 0.5 + gain / 2, "margin": gain, "nll": 1 - gain / 2}
        trial.note(step, 20, {f"eval/{name}": each for name, each in numbers.items()})
    trial.state = "finished" if number > 3 else "stopped"
    return trial


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
