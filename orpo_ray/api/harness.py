"""The usual benchmarks, by lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo_ray.api.ground import PRINTING, refuse_others, tokenizer_of
from orpo_ray.api.trained import decide_for_one, to_load
from orpo_ray.config import RunConfig
from orpo_ray.errors import ConfigError
from orpo_ray.lean_imports import without_collections
from orpo_ray.runs.console import Console
from orpo_ray.runs.results import Benchmarks
from orpo_ray.runs.run import Run

if TYPE_CHECKING:
    from orpo_ray.evaluation.harness import Candidate, Tasks


def evaluate_by_harness(
    config: RunConfig,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    chat_template: bool = False,
    batch_size: int | None = None,
    base_only: bool = False,
    adapter: str | PathLike[str] | None = None,
    merged: str | PathLike[str] | None = None,
    console: Console = PRINTING,
) -> Benchmarks:
    """Let lm-evaluation-harness measure the base and what the run made of it.

    `tasks` are names that lm-eval knows, or its YAML files. The trained model is the adapter on the
    base as it was held in training, or `merged`, a folder that `export` wrote. `base_only` measures
    the base alone, and `adapter` names another adapter or run. The result is kept in the run's
    folder, in lm-eval.json. Raises ConfigError without the extra `lm-eval`.
    """
    refuse_others(config, console)
    _refuse_contradictions(tasks, base_only, adapter, merged)
    whole = Run(config)
    run, trained = to_load(config, adapter, base_only=base_only or merged is not None)
    whole.benchmarks()  # A damaged file is refused before hours of work.
    with without_collections():
        from orpo_ray.evaluation import harness

    folder = None if merged is None else harness.merged_folder(fspath(merged), whole.name)
    asked = harness.Tasks(
        names=tasks,
        loaded=harness.load_tasks(tasks),
        limit=limit,
        fewshot=fewshot,
        chat_template=chat_template,
        batch_size=batch_size,
    )
    base = _base(run, console)
    candidates = {"base": base}
    if not base_only:
        candidates["trained"] = _trained(base, trained, folder)
    found = {who: _measured(each, asked, console) for who, each in candidates.items()}
    models = {who: candidate.told(chat_template) for who, candidate in candidates.items()}
    benchmarks = harness.benchmarks_of(whole.name, models, asked, found)
    try:
        whole.keep_benchmarks(benchmarks)
    except OSError as error:  # the run may be read-only for this user
        console.announce(f"{whole.place}: the numbers are not kept there: {error.strerror}")
    return benchmarks


def _refuse_contradictions(
    tasks: Sequence[str],
    base_only: bool,
    adapter: str | PathLike[str] | None,
    merged: str | PathLike[str] | None,
) -> None:
    """Raise ConfigError for wishes that do not fit."""
    if not tasks or not all(tasks):
        raise ConfigError("--lm-eval: name one task or more, with commas between them")
    if base_only and (adapter or merged):
        given = "--adapter" if adapter else "--merged"
        raise ConfigError(f"--base-only judges the base alone; leave out {given}")
    if adapter and merged:
        raise ConfigError("--merged and --adapter each name the model to judge; give one of them")


def _base(run: Run, console: Console) -> Candidate:
    """What the run began with."""
    from orpo_ray.evaluation.harness import Candidate
    from orpo_ray.models.hardware import probe_hardware

    return Candidate(
        config=run.config,
        decisions=decide_for_one(run, None, probe_hardware(), console),
        tokenizer=tokenizer_of(run.config, console),
    )


def _trained(base: Candidate, trained: str | None, merged: Path | None) -> Candidate:
    """The trained model, which has the base's settings, or a folder with a tokenizer of its own."""
    from orpo_ray.evaluation.harness import merged_tokenizer

    if merged is None:
        return replace(base, trained=trained)
    return replace(base, merged=merged, tokenizer=merged_tokenizer(merged))


def _measured(candidate: Candidate, asked: Tasks, console: Console) -> Mapping[str, Any]:
    """What lm-eval says of a model, whose memory is free again afterwards."""
    from orpo_ray.evaluation.harness import measure
    from orpo_ray.evaluation.memory import freed

    place = candidate.merged or candidate.trained or candidate.config.model.base
    console.announce(f"lm-eval measures {place} on {', '.join(asked.names)}")
    return freed(measure, candidate, asked)
