"""A run's metrics.jsonl: each line is one report, with numbers of a step.

Their names begin with `train/` or `eval/`.
"""

import json
import math
from pathlib import Path

from orpo_ray.runs.console import Metrics
from orpo_ray.runs.files import METRICS_FILE


def plain_record(step: int, metrics: Metrics) -> dict[str, float | None]:
    """The numbers of a step for JSON, with None for those that are not finite.

    JSON cannot write the infinite gradient norm of a float16 step that was skipped.
    """
    return {
        "step": step,
        **{name: float(value) if math.isfinite(value) else None for name, value in metrics.items()},
    }


def last_metrics(folder: Path) -> Metrics:
    """The latest finite number of every metric that a run reported."""
    merged: Metrics = {}
    for record in records(folder):
        merged |= {name: value for name, value in record.items() if value is not None}
    merged.pop("step", None)
    return merged


def evaluations(folder: Path) -> list[Metrics]:
    """Every evaluation of a run: its step and the numbers under `eval/`."""
    found = [
        {k: v for k, v in record.items() if k == "step" or k.startswith("eval/")}
        for record in records(folder)
    ]
    return [evaluation for evaluation in found if len(evaluation) > 1]


def metrics_at(folder: Path, step: int, prefix: str) -> Metrics:
    """The numbers of one step whose names begin with `prefix`."""
    found: Metrics = {}
    for record in records(folder):
        if record["step"] == step:
            found |= {name: value for name, value in record.items() if name.startswith(prefix)}
    return found


def metric_by_step(folder: Path, name: str) -> dict[int, float]:
    """One metric's value at every step that reported it."""
    return {int(record["step"]): record[name] for record in records(folder) if name in record}


def lines_until(text: str, step: int) -> str:
    """The whole lines up to a step of a metrics.jsonl, or of another file with a step in each."""
    lines = ((line, read_metrics_line(line)) for line in text.splitlines())
    return "".join(
        f"{line}\n" for line, record in lines if record is not None and record["step"] <= step
    )


def read_metrics_line(line: str) -> Metrics | None:
    """One record of metrics.jsonl.

    None for an incomplete line, which a kill or a power failure leaves.
    """
    try:
        found = json.loads(line)
    except ValueError:
        return None
    is_record = isinstance(found, dict) and isinstance(found.get("step"), int | float)
    return found if is_record else None


def records(folder: Path) -> list[Metrics]:
    """Every report of a run, in its order; a number that was not finite is None."""
    path = folder / METRICS_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [record for record in map(read_metrics_line, text.splitlines()) if record is not None]
