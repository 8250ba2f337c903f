"""How many machines a scheduler is asked for, and of what size, given a run's `scale`."""

import math
from dataclasses import dataclass

from orpo_ray.config import ScaleConfig
from orpo_ray.errors import ConfigError


@dataclass(frozen=True)
class Nodes:
    """Machines of one kind, and what a run takes of each."""

    count: int
    gpus: int
    cpus: int
    memory_gib: int


def nodes_for(
    scale: ScaleConfig, count: int, gpus: int | None, cpus: int, memory_gib: int
) -> Nodes:
    """Machines that hold a run's workers; GPUs per node follow from the workers unless given.

    Raises ConfigError if the GPUs do not follow, or if the workers do not fit.
    """
    if scale.workers == "auto":
        if gpus is None:
            raise ConfigError(
                "scale.workers: auto takes all GPUs, whose number is not known beforehand; "
                "give --gpus-per-node (0 trains on CPUs), or set scale.workers"
            )
        return Nodes(count, gpus, cpus, memory_gib)
    per_node = math.ceil(scale.workers / count)
    needed = math.ceil(per_node * _gpus_of_a_worker(scale, gpus))
    _refuse("--gpus-per-node", gpus, needed, per_node)
    _refuse("--cpus-per-node", cpus, math.ceil(per_node * scale.least_cpus), per_node)
    return Nodes(count, needed if gpus is None else gpus, cpus, memory_gib)


def _gpus_of_a_worker(scale: ScaleConfig, gpus: int | None) -> float:
    """GPUs of a worker. `auto` means one, or none if the nodes have no GPU."""
    if scale.gpus_per_worker == "auto":
        return 0.0 if gpus == 0 else 1.0
    return scale.gpus_per_worker


def _refuse(option: str, given: int | None, needed: int, workers: int) -> None:
    if given is not None and given < needed:
        raise ConfigError(
            f"{option}: {given} are too few for the {workers} workers of a node, which take "
            f"{needed}"
        )
