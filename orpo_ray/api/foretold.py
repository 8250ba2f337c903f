"""Says at the start of a run what the planner expects, and at its end how wrong that was."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import psutil

from orpo_ray.config import RunConfig
from orpo_ray.errors import CannotTellError, ConfigError, OrpoRayError
from orpo_ray.runs.console import Console
from orpo_ray.runs.files import RUN_FILE
from orpo_ray.runs.run import Run

if TYPE_CHECKING:
    from orpo_ray.data.store import Artifact
    from orpo_ray.distributed.preflight import Placement
    from orpo_ray.models.hardware import Hardware
    from orpo_ray.planner.hardware import Gpu
    from orpo_ray.planner.prediction import Prediction

_KEY, _KEPT = "plan", ("predicted", "measured")
_NETWORK = "10gbit"
"""What joins servers, as long as nobody says it. It counts only for runs on several."""


@dataclass(frozen=True)
class Foretold:
    """A prediction by the planner's own laws, and as earlier runs on the device correct it."""

    raw: Prediction
    shown: Prediction


def foretell(
    run: Run, artifact: Artifact, placement: Placement, hardware: Hardware, console: Console
) -> Foretold | None:
    """Announce the planned time and memory of a run; None if the planner cannot tell."""
    from orpo_ray.planner.calibration import calibration_file, read_calibrations
    from orpo_ray.planner.prediction import calibrated

    try:
        found = _predict(run, artifact, placement, hardware)
        known = read_calibrations(calibration_file()).get(found.device)
    except OrpoRayError as error:
        console.announce(f"not planned: {error}")
        return None
    except Exception as error:  # noqa: BLE001 - a fault of the planner must not end a run
        console.announce(f"not planned: unexpected {type(error).__name__}: {error}")
        return None
    shown = calibrated(found, known)
    seconds, memory = shown.seconds, shown.peak_bytes
    learnt = "" if known is None else f" (calibrated by {known.told})"
    console.announce(
        f"planned: {_duration(seconds.low)} to {_duration(seconds.high)} of training, "
        f"{memory.low / 1e9:.2g} to {memory.high / 1e9:.2g} GB a worker{learnt}"
    )
    return Foretold(found, shown)


def _duration(seconds: float) -> str:
    """A time in the unit that reads best."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def look_back(run: Run, foretold: Foretold | None, console: Console) -> None:
    """Say how wrong the plan was, and keep both in run.json."""
    result = run.result()
    if foretold is None or result is None:
        return
    from orpo_ray.planner.prediction import compare

    measured = {
        "seconds": result.seconds,
        "pairs_per_second": result.pairs_per_second,
        "peak_bytes": result.peak_memory_bytes,
    }
    run.fetch(RUN_FILE)  # a worker on another server has written to it
    run.add_facts({_KEY: {"predicted": foretold.raw.to_json(), "measured": measured}})
    run.store(RUN_FILE)
    console.announce(compare(foretold.shown.to_json(), measured))


def calibrate(config: RunConfig) -> dict[str, Any]:
    """Learn from a finished run how far plans are off on its device, for all later plans there.

    Raises ConfigError for a run that has no plan, or that has measured nothing.
    """
    from orpo_ray.planner.calibration import (
        Calibration,
        calibration_file,
        learn,
        read_calibrations,
        write_calibrations,
    )

    run = Run(config)
    run.refresh()
    written = run.facts().get(_KEY)
    if not isinstance(written, dict) or not all(written.get(key) for key in _KEPT):
        raise ConfigError(
            f"--calibrate: {run.place} has no plan in {RUN_FILE}; take a finished run of this "
            "version whose base the planner knows"
        )
    path = calibration_file()
    known = read_calibrations(path)
    device = written["predicted"]["device"]
    before = known.get(device)
    new = learn(before, written["predicted"], written["measured"])
    write_calibrations(path, known | {device: new})
    old = before or Calibration(1.0, 1.0, 0)
    return {
        "device": device,
        "file": str(path),
        **asdict(new),
        "changes": [
            f"{device}: time times {new.seconds:.2f} (before: {old.seconds:.2f}), memory times "
            f"{new.memory:.2f} (before: {old.memory:.2f}), from {new.told}; kept in {path}"
        ],
    }


def _predict(run: Run, artifact: Artifact, placement: Placement, hardware: Hardware) -> Prediction:
    """Raises CannotTellError for what the planner does not know, or does not expect to fit."""
    from orpo_ray.planner.bases import find_shape
    from orpo_ray.planner.hardware import find_network
    from orpo_ray.planner.lengths import Lengths
    from orpo_ray.planner.plan import Paper, Place
    from orpo_ray.planner.prediction import predict

    gpu = _device(run, placement, hardware)
    if gpu is None:
        raise CannotTellError(f"the planner does not know {hardware.name}")
    lengths = Lengths(
        lengths=artifact.train.lengths,
        pairs=len(artifact.train),
        held_out=len(artifact.eval),
        source="prepared pairs",
    )
    paper = Paper(
        config=run.config,
        shape=find_shape(run.config.model.base, run.config.model.revision).shape,
        lengths=lengths,
        place=Place(
            count=max(1, placement.workers // placement.nodes),
            nodes=placement.nodes,
            network=find_network(_NETWORK),
        ),
    )
    stage = paper.stage(run.config, gpu)
    found = predict(stage, gpu.name)
    if found is None:
        raise CannotTellError(
            f"by the planner's law {stage.fit.missing / 1e9:.2g} GB of memory are missing; the "
            "largest micro-batch is tried all the same"
        )
    return found


def _device(run: Run, placement: Placement, hardware: Hardware) -> Gpu | None:
    """What a worker computes on; None for a GPU that the planner does not know."""
    from orpo_ray.planner.here import cpu, gpu_named

    if hardware.device != "cpu":
        return gpu_named(hardware.name, hardware.memory or 0)
    memory = psutil.virtual_memory().available // placement.workers
    if placement.uses_ray:
        return cpu(run.config.scale.cpus_per_worker, memory)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return cpu(int(threads) if threads.isdecimal() else os.cpu_count() or 1, memory)
