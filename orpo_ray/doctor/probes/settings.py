"""What the settings of a run ask of a server, looked for by the checks of the run itself."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from orpo_ray.config import RunConfig
from orpo_ray.doctor.facts import Asked, Settings
from orpo_ray.errors import ResourceError

if TYPE_CHECKING:
    from orpo_ray.models.hardware import Hardware

_ANY_GPU = "cuda"


def look(asked: Asked) -> Settings | None:
    """What the checks refuse; None if no run is named."""
    return judged(asked.runs, _gpus()) if asked.runs else None


def judged(runs: Sequence[RunConfig], gpus: Sequence["Hardware"]) -> Settings:
    """What the checks of these runs refuse on a server with these kinds of GPUs."""
    missing = _said(check for run in runs for check in _of_packages(run))
    unfit = _said(
        check
        for run in runs
        for hardware in _workers(run, gpus)
        for check in _of_hardware(run, hardware)
    )
    return Settings(
        has_gpu=bool(gpus),
        missing=missing,
        unfit=tuple(problem for problem in unfit if problem not in missing),
    )


def _gpus() -> list["Hardware"]:
    """The kinds of GPUs that torch finds."""
    import torch

    from orpo_ray.models.hardware import probe_hardware

    found = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        with torch.cuda.device(number):
            found.append(probe_hardware())
    return list(dict.fromkeys(found))


def _workers(run: RunConfig, gpus: Sequence["Hardware"]) -> Sequence["Hardware"]:
    """What a run's workers may compute on; nothing if it wants GPUs, and there are none."""
    from orpo_ray.models.hardware import CPU

    wanted = run.scale.gpus_per_worker
    if not wanted:
        return [CPU]
    return gpus or ([CPU] if wanted == "auto" else [])


def _of_packages(run: RunConfig) -> Iterator[Callable[[], object]]:
    from orpo_ray.training.packages import refuse_missing_optimizer
    from orpo_ray.training.trackers import refuse_missing_trackers

    yield partial(refuse_missing_trackers, run)
    yield partial(refuse_missing_optimizer, run, _ANY_GPU)


def _of_hardware(run: RunConfig, hardware: "Hardware") -> Iterator[Callable[[], object]]:
    from orpo_ray.models.hardware import choose_numerics
    from orpo_ray.training.packages import refuse_missing_optimizer

    yield partial(refuse_missing_optimizer, run, hardware.device)
    yield partial(choose_numerics, run.model, hardware)


def _said(checks: Iterator[Callable[[], object]]) -> tuple[str, ...]:
    """The message of each check that refuses, once."""
    found: dict[str, None] = {}
    for check in checks:
        try:
            check()
        except ResourceError as error:
            found[str(error)] = None
    return tuple(found)
