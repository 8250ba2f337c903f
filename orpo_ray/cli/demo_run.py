"""The demo's settings, its judge of greedy answers, and the table it ends with."""

import importlib.resources
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orpo_ray.config import RunConfig, build
from orpo_ray.errors import ConfigError
from orpo_ray.runs.files import CONFIG_FILE, EVALUATION_FILE
from orpo_ray.runs.results import Evaluation, Sample, TrainResult
from orpo_ray.runs.run import Run

_FOLDER = Path(str(importlib.resources.files("orpo_ray") / "demo"))
_HELD_OUT = ("h1", "h2", "h3")
_VERDICTS = ("good", "bad", "broken")
_SHOWN_ANSWERS = 3
_LABELS = {
    "h1": "accuracy: new wordings, new nouns",
    "h2": "accuracy: new phrases in the answers, too",
    "h3": "accuracy: a new kind of question",
}


def demo_config(objective: str, storage: str, stamp: str) -> RunConfig:
    """The run of an objective's recipe. `stamp` gives each demo a folder of its own."""
    recipes = yaml.safe_load((_FOLDER / "recipes.yaml").read_text(encoding="utf-8"))
    common, own = recipes["common"], recipes.get(objective, {"objective": {"kind": objective}})
    tree = {
        **common,
        "name": f"demo-{objective}-{stamp}",
        "storage": storage,
        "model": {"base": str(_FOLDER / "base"), **common["model"]},
        "data": {
            "train": [{"source": str(_FOLDER / "train.jsonl")}],
            "eval": [{"source": str(_FOLDER / f"{name}.jsonl")} for name in _HELD_OUT],
            "max_length": 96,
            "max_prompt_length": 48,
        },
        "objective": own["objective"],
        "training": {**common["training"], **own.get("training", {})},
    }
    return build(RunConfig, tree, {(): str(_FOLDER / "recipes.yaml")})


def next_demo(objective: str, storage: str) -> RunConfig:
    """The newest interrupted demo of an objective that can be resumed, or a new one.

    A demo ends with its evaluation.
    """
    new = demo_config(objective, storage, time.strftime("%Y%m%d-%H%M%S"))
    begun = [path.parent for path in Run(new).root.glob(f"demo-{objective}-*/{CONFIG_FILE}")]
    for folder in sorted(begun, reverse=True):
        if not (folder / EVALUATION_FILE).exists():
            config = _interrupted_demo(
                objective, storage, folder.name.removeprefix(f"demo-{objective}-")
            )
            if config is not None:
                return config
    return new


def _interrupted_demo(objective: str, storage: str, stamp: str) -> RunConfig | None:
    """The demo of that stamp; None if a process works on it, or it has another recipe or damage."""
    try:
        config = demo_config(objective, storage, stamp)
        run = Run(config)
        with run.lock():
            run.refuse_changes()
            run.result()  # one that is damaged cannot be evaluated
    except (ConfigError, OSError):
        return None
    return config


def judge_prompts() -> list[dict[str, Any]]:
    """The held-out questions, each with its right and its wrong fact."""
    return list(_judge()["prompts"])


def verdict(answer: str | None, question: dict[str, Any]) -> str:
    """Good: polite and right. Bad: rude and wrong. Broken: anything else."""
    judge = _judge()
    if _stands_between(answer, judge["polite_openers"], question["right"], judge["polite_closers"]):
        return "good"
    if _stands_between(answer, judge["rude_openers"], question["wrong"], judge["rude_closers"]):
        return "bad"
    return "broken"


def demo_outcome(config: RunConfig, trained: TrainResult, evaluation: Evaluation) -> dict[str, Any]:
    """The demo's numbers, all from the run and its evaluation."""
    before, after = evaluation.metrics["base"], evaluation.metrics["trained"]
    counts = {who: _count_verdicts(evaluation.samples, who) for who in ("base", "trained")}
    accuracies = {f"{name}_before": before[f"{name}.jsonl"]["accuracy"] for name in _HELD_OUT}
    accuracies |= {f"{name}_after": after[f"{name}.jsonl"]["accuracy"] for name in _HELD_OUT}
    return {
        "objective": config.objective.kind,
        "accuracy_before": accuracies["h1_before"],
        "accuracy_after": accuracies["h1_after"],
        **accuracies,
        "greedy_before": counts["base"],
        "greedy_after": counts["trained"],
        "greedy_good": counts["trained"]["good"],
        "adapter": trained.adapter,
        "report": trained.report,
        "base": config.model.base,
        "eval_file": str(_FOLDER / "h1.jsonl"),
        "quantized_modules": evaluation.quantized_modules,
        "workers": list(trained.workers),
        "strategy": trained.strategy,
        "ray_version": trained.versions["ray"],
        "steps": trained.steps,
        "pairs_per_second": trained.pairs_per_second,
    }


def print_demo(outcome: dict[str, Any], evaluation: Evaluation) -> None:
    """The most telling numbers and a few answers."""
    console = Console()
    table = Table(
        title=f"{outcome['objective'].upper()} with NF4 QLoRA, on pairs it never saw",
        title_justify="left",
    )
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for name in _HELD_OUT:
        table.add_row(
            _LABELS[name], f"{outcome[f'{name}_before']:.2f}", f"{outcome[f'{name}_after']:.2f}"
        )
    before, after = (evaluation.metrics[who]["all"] for who in ("base", "trained"))
    for key, label in (("chosen_logp", "chosen"), ("rejected_logp", "rejected")):
        table.add_row(f"{label} log-prob per token", f"{before[key]:.2f}", f"{after[key]:.2f}")
    for kind, label in zip(
        _VERDICTS, ("polite and right", "rude and wrong", "anything else"), strict=True
    ):
        row = [
            f"{outcome[when][kind]} of {len(evaluation.samples)}"
            for when in ("greedy_before", "greedy_after")
        ]
        table.add_row(f"greedy answers: {label}", *row)
    console.print(table)
    for question, sample in _telling(evaluation.samples):
        console.print(Text(question["prompt"][-1]["content"], style="bold"))
        console.print(Text(f"  before: {sample.base}"))
        console.print(Text(f"  after:  {sample.trained}"))
    console.print(
        f"{outcome['seconds']:.0f} seconds; adapter: {outcome['adapter']}", soft_wrap=True
    )
    if outcome["report"]:
        console.print(f"look at it in a browser: {outcome['report']}", soft_wrap=True)


def _telling(samples: Sequence[Sample]) -> list[tuple[dict[str, Any], Sample]]:
    """A few answers to show.

    First come answers that were rude and wrong and are good now, then others that changed.
    """
    both = list(zip(judge_prompts(), samples, strict=True))
    mended = [
        (q, s) for q, s in both if verdict(s.base, q) == "bad" and verdict(s.trained, q) == "good"
    ]
    changed = [(q, s) for q, s in both if (q, s) not in mended and s.base != s.trained]
    return (mended + changed + both)[:_SHOWN_ANSWERS]


def _count_verdicts(samples: Sequence[Sample], who: str) -> dict[str, int]:
    verdicts = Counter(
        verdict(getattr(s, who), question)
        for question, s in zip(judge_prompts(), samples, strict=True)
    )
    return {kind: verdicts[kind] for kind in _VERDICTS}


def _stands_between(answer: str | None, openers: list[str], fact: str, closers: list[str]) -> bool:
    return any(answer == f"{opener} {fact} {closer}" for opener in openers for closer in closers)


def _judge() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((_FOLDER / "judge.json").read_text(encoding="utf-8"))
    return content
