"""Says at the start of a run what the planner expects, and at its end how wrong that was."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from orpo_ray.errors import CannotTellError, OrpoRayError
from orpo_ray.planner.bases import find_shape
from orpo_ray.planner.calibration import calibration_file, read_calibrations
from orpo_ray.planner.foreseen import Prediction
from orpo_ray.planner.hardware import USUAL_NETWORK, Gpu, find_network
from orpo_ray.planner.here import cpu, gpu_named
from orpo_ray.planner.lengths import Lengths
from orpo_ray.planner.plan import Paper, Place
from orpo_ray.planner.prediction import calibrated, compare, predict
from orpo_ray.runs.console import Console
from orpo_ray.runs.files import PLAN
from orpo_ray.runs.run import Run
from orpo_ray.training.set_threads import threads_set_by

if TYPE_CHECKING:
    from orpo_ray.data.store import Artifact
    from orpo_ray.models.hardware import Hardware


class Workers(Protocol):
    """Where a run's workers are."""

    @property
    def workers(self) -> int:
        """How many there are."""

    @property
    def nodes(self) -> int:
        """How many servers hold them."""

    @property
    def cpus(self) -> float:
        """CPUs of each."""

    @property
    def uses_ray(self) -> bool:
        """Whether Ray starts them."""


@dataclass(frozen=True)
class Foretold:
    """A prediction by the planner's own laws, and as earlier runs on the device correct it."""

    raw: Prediction
    shown: Prediction


def foretell(
    run: Run, artifact: "Artifact", workers: Workers, hardware: "Hardware", console: Console
) -> Foretold | None:
    """Announce the planned time and memory of a run; None if the planner cannot tell."""
    try:
        found = _predict(run, artifact, workers, hardware)
        known = read_calibrations(calibration_file()).get(found.device)
    except OrpoRayError as error:
        console.announce(f"not planned: {error}")
        return None
    except Exception as error:  # noqa: BLE001 - a fault of the planner must not end a run
        console.announce(f"not planned: unexpected {type(error).__name__}: {error}")
        return None
    shown = calibrated(found, known)
    seconds, memory = shown.seconds, shown.peak_bytes
    notes = [] if workers.nodes == 1 else [f"servers joined by {USUAL_NETWORK}"]
    if known is not None:
        notes.append(f"calibrated by {known.told}")
    console.announce(
        f"planned: {_duration(seconds.low)} to {_duration(seconds.high)} of training, "
        f"{memory.low / 1e9:.2g} to {memory.high / 1e9:.2g} GB a worker"
        + (f" ({'; '.join(notes)})" if notes else "")
    )
    return Foretold(found, shown)


def _duration(seconds: float) -> str:
    """A time in the unit that reads best."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def on_record(foretold: Foretold | None) -> dict[str, Any] | None:
    """What run.json keeps of a prediction."""
    return None if foretold is None else foretold.raw.to_json()


def look_back(run: Run, foretold: Foretold | None, console: Console) -> None:
    """Say how wrong the plan of a finished run was, as its run.json has it."""
    if foretold is not None:
        console.announce(compare(foretold.shown.to_json(), run.facts()[PLAN]["measured"]))


def _predict(run: Run, artifact: "Artifact", workers: Workers, hardware: "Hardware") -> Prediction:
    """Raises CannotTellError for what the planner does not know, or does not expect to fit."""
    gpu = _device(run, workers, hardware)
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
            count=max(1, workers.workers // workers.nodes),
            nodes=workers.nodes,
            network=find_network(USUAL_NETWORK),
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


def _device(run: Run, workers: Workers, hardware: "Hardware") -> Gpu | None:
    """What a worker computes on; None for a GPU that the planner does not know."""
    if hardware.device != "cpu":
        return gpu_named(hardware.name, hardware.memory or 0)
    memory = psutil.virtual_memory().available // workers.workers
    if workers.uses_ray:
        return cpu(workers.cpus, memory)
    return cpu(threads_set_by(run.config.scale) or os.cpu_count() or 1, memory)
