"""What a run's folder holds, read once, for those who build its page."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from orpo_ray.config import RunConfig, stage_configs
from orpo_ray.errors import ConfigError
from orpo_ray.runs.console import Announce, Metrics
from orpo_ray.runs.files import (
    EVALUATION_FILE,
    METRICS_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    read_json,
)
from orpo_ray.runs.lock import RUN_LOCK_FILE, WORKERS_LOCK_FILE, is_locked
from orpo_ray.runs.metrics import read_metrics_line, records
from orpo_ray.runs.results import TrainResult
from orpo_ray.runs.run import Run
from orpo_ray.runs.scores import PairScores

Read = TypeVar("Read")
State = Literal["finished", "running", "not finished", "not begun"]


@dataclass(frozen=True, kw_only=True)
class RunContent:
    """One run, or one stage of a run, as its files tell it.

    A file that is not there yet leaves its field empty.
    """

    name: str
    place: str
    config: RunConfig
    state: State
    facts: dict[str, Any]
    """run.json."""
    records: tuple[Metrics, ...] = ()
    """metrics.jsonl."""
    scores: dict[int, PairScores]
    """The scores of each held-out pair, by the step of the evaluation."""
    result: TrainResult | None = None
    samples: tuple[dict[str, Any], ...] = ()
    """samples.jsonl."""
    evaluation: dict[str, Any] | None = None
    """evaluation.json: what `evaluate` found of the finished run."""
    stages: tuple["RunContent", ...] = ()

    def values(self, name: str) -> list[tuple[int, float]]:
        """A metric at every step that reported a finite value of it."""
        return [
            (int(record["step"]), record[name])
            for record in self.records
            if isinstance(record.get(name), int | float) and math.isfinite(record[name])
        ]

    @property
    def evaluations(self) -> list[Metrics]:
        """The reports of evaluations."""
        return [
            record for record in self.records if any(name.startswith("eval/") for name in record)
        ]

    @property
    def steps(self) -> int:
        """The last step on record."""
        return max((int(record["step"]) for record in self.records), default=0)

    @property
    def held_out(self) -> int | None:
        """How many held-out pairs an evaluation compares; None if nobody has told."""
        if self.scores:
            return self.scores[max(self.scores)].comparable.comparisons
        return self.result.eval_pairs if self.result else None


def read_run(run: Run, announce: Announce) -> RunContent:
    """Read a run's files, those of its stages included. What cannot be read is announced.

    Raises ConfigError for a run that is not there.
    """
    run.refresh()
    if not run.folder.is_dir():
        raise ConfigError(f"{run.place}: no run is there yet; `orpo-ray train` begins it")
    stages = tuple(
        read_run(stage, announce)
        for stage in (Run(config, is_stage=True) for config in stage_configs(run.config))
        if stage.fetch(METRICS_FILE).exists()
    )
    return RunContent(
        name=run.name,
        place=run.place,
        config=run.config,
        state=_state(run, has_stages=bool(stages)),
        facts=read_json(run.fetch(RUN_FILE)) or {},
        records=tuple(records(run.fetch(METRICS_FILE).parent)),
        scores=_scores(run, announce),
        result=run.result(),
        samples=_samples(run.fetch(SAMPLES_FILE)),
        evaluation=_if_whole(lambda: read_json(run.fetch(EVALUATION_FILE)), announce),
        stages=stages,
    )


def _state(run: Run, has_stages: bool) -> State:
    if run.result() is not None:
        return "finished"
    if any(is_locked(run.path(name)) for name in (RUN_LOCK_FILE, WORKERS_LOCK_FILE)):
        return "running"
    return "not finished" if has_stages or run.path(METRICS_FILE).exists() else "not begun"


def _scores(run: Run, announce: Announce) -> dict[int, PairScores]:
    """The scores of each evaluation on record; damaged ones are left out."""
    steps = [
        int(record["step"])
        for record in records(run.folder)
        if any(name.startswith("eval/") for name in record)
    ]
    found = {step: _if_whole(partial(run.scores, step), announce) for step in steps}
    return {step: scores for step, scores in found.items() if scores is not None}


def _if_whole(read: Callable[[], Read], announce: Announce) -> Read | None:
    """What `read` returns; None, announced, for a file that is damaged."""
    try:
        return read()
    except ConfigError as error:
        announce(f"left out of the page: {error}")
        return None


def _samples(path: Path) -> tuple[dict[str, Any], ...]:
    """The answers on record. A line that is not as a run writes it does not count."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    rows: list[Any] = [read_metrics_line(line) for line in text.splitlines()]
    return tuple(row for row in rows if row is not None and {"prompt", "answer"} <= row.keys())
