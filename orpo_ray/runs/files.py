"""The names of a run's files, and JSON files that are never half written."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from orpo_ray.errors import ConfigError

CONFIG_FILE, RUN_FILE, RESULT_FILE, METRICS_FILE = (
    "config.json",
    "run.json",
    "result.json",
    "metrics.jsonl",
)
SEARCH_FILE = "search.json"
"""The record of a search. Its folder holds the runs of its trials."""
LOG_FILE = "run.log"
CHECKPOINTS, TENSORBOARD, ADAPTER = "checkpoints", "tensorboard", "adapter"
EVALUATION_FILE, BASE_EVALUATION_FILE = "evaluation.json", "evaluation-base.json"
"""What `evaluate` found: the base compared with the trained model, or the base alone."""
LM_EVAL_FILE = "lm-eval.json"
"""What lm-evaluation-harness found: all evaluations by it, the newest last."""
EVALUATIONS = "evaluations"
"""The folder with the scores of each held-out pair, one file for each evaluation."""
SAMPLES_FILE = "samples.jsonl"
"""Answers to a few held-out prompts at each evaluation, one a line."""
PLAN = "plan"
"""Where run.json keeps a run's prediction, and what was measured."""
ENDED_BY = "ended_by"
"""Where run.json keeps why a run ended before its last step: its error, or that it was stopped."""
PAIRS, REASONS, RESUMED = "pairs", "reasons", "resumed"
"""Names in run.json: what became of the rows, why each `auto` was decided as it was, and each
resume (its `step`, and how many steps were computed `again`)."""
REPORT_FILE = "report.html"
"""The page that shows a run, a search or a comparison."""
COMPARISON_FILE = "comparison.json"
"""The record of a comparison of methods. Its folder holds their runs."""
CHECKPOINT_MANIFEST = "MANIFEST.json"
"""Lists the files of a checkpoint; written last."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a killed process leaves the old file or the new one, never a part."""
    with written_whole(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def written_whole(path: Path) -> Iterator[IO[str]]:
    """A file to write, which takes its place when it is whole and on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file that `write_json` wrote, or None if there is none yet."""
    try:
        content: dict[str, Any] | None = (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        )
        if not isinstance(content, dict | None):
            raise ValueError("not an object")
    except ValueError as error:
        raise damaged(path, error) from error
    return content


def damaged(path: Path, error: Exception) -> ConfigError:
    """The error for a file that is not as the run wrote it."""
    return ConfigError(
        f"{path}: not as this version writes it ({error}); restore the file, or give the new run "
        "another name"
    )
