"""What a run in stages leaves behind: what an ordinary run does, taken from its last stage."""

import shutil
from collections.abc import Sequence
from dataclasses import replace

from orpo_ray.runs.files import ADAPTER, RUN_FILE
from orpo_ray.runs.results import TrainResult
from orpo_ray.runs.run import Run


def conclude_stages(run: Run, last: Run, results: Sequence[TrainResult]) -> TrainResult:
    """Lay the last stage's adapter in the run's own folder, and write result.json, last of all."""
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
