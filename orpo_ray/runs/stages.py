"""Concludes a run in stages: its adapter, run.json and result.json come from its last stage."""

import shutil
from collections.abc import Sequence
from dataclasses import replace

from orpo_ray.runs.files import ADAPTER, RUN_FILE
from orpo_ray.runs.results import TrainResult
from orpo_ray.runs.run import Run


def conclude_stages(run: Run, last: Run, results: Sequence[TrainResult]) -> TrainResult:
    """Copy the last stage's adapter into the run's own folder, then write result.json."""
    last.storage.fetch_folder(last.path(ADAPTER))
    run.lay_adapter(last.path(ADAPTER))
    shutil.copyfile(last.fetch(RUN_FILE), run.path(RUN_FILE))
    result = replace(
        results[-1],
        name=run.name,
        steps=sum(result.steps for result in results),
        adapter=run.adapter,
        stages=tuple(results),
    )
    run.conclude(result)
    return result
