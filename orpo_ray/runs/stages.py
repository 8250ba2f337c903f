"""Concludes a run in stages: its adapter and run.json are those of its last stage."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from orpo_ray.config import RunConfig
from orpo_ray.errors import ConfigError
from orpo_ray.runs.files import ADAPTER, RUN_FILE
from orpo_ray.runs.results import TrainResult
from orpo_ray.runs.run import Run
from orpo_ray.runs.summary import compared, plain, remarks


def conclude_stages(run: Run, stages: Sequence[Run], results: Sequence[TrainResult]) -> TrainResult:
    """Copy the last stage's adapter into the run's own folder, then write result.json."""
    last = stages[-1]
    last.storage.fetch_folder(last.path(ADAPTER))
    run.lay_adapter(last.path(ADAPTER))
    shutil.copyfile(last.fetch(RUN_FILE), run.path(RUN_FILE))
    result = replace(
        results[-1],
        name=run.name,
        steps=sum(result.steps for result in results),
        adapter=run.adapter,
        stages=tuple(results),
        **_cost(results),
        **_gain(stages, results),
    )
    run.conclude(result)
    return result


def _cost(results: Sequence[TrainResult]) -> dict[str, Any]:
    """Time, speed and memory of all stages together."""
    seconds = [result.seconds or 0.0 for result in results]
    pairs = sum(
        (result.pairs_per_second or 0.0) * spent
        for result, spent in zip(results, seconds, strict=True)
    )
    return {
        "seconds": sum(seconds),
        "pairs_per_second": pairs / sum(seconds) if sum(seconds) else None,
        "peak_memory_bytes": max(result.peak_memory_bytes or 0 for result in results) or None,
    }


def have_same_held_out(one: RunConfig, other: RunConfig) -> bool:
    """Whether two stages are evaluated on the same held-out pairs, so that they can be compared."""
    return _held_out(one) == _held_out(other)


def _held_out(config: RunConfig) -> tuple[Any, ...]:
    """The settings that shape the held-out pairs."""
    data, template = config.data, config.model.chat_template
    if data.eval:
        return (data.model_copy(update={"train": ()}), template)
    return (data, template, config.training.seed)


def _gain(stages: Sequence[Run], results: Sequence[TrainResult]) -> dict[str, Any]:
    """What all stages changed together, if the first and the last have the same held-out pairs.

    Otherwise the figures are those of the last stage, and a remark says so.
    """
    first, last, step = stages[0], stages[-1], results[-1].adapter_step
    found = {}
    if step is not None and have_same_held_out(first.config, last.config):
        with suppress(ConfigError):  # damaged scores cost these figures, not the run
            found = compared(first.scores(0), last.scores(step))
    if not found:
        told = (
            "The figures compare the last stage with its own start: the first stage has other "
            "held-out pairs, or its scores are not on record."
        )
        return {"remarks": (*results[-1].remarks, told)}
    pairs = results[-1].eval_pairs or 0
    return {
        "start": results[0].start,
        "changes": plain(found),
        "remarks": tuple(remarks(found, pairs)),
    }
