"""The machines that a scheduler is asked for, as far as a run's `scale` leaves that open."""

import math
from dataclasses import dataclass

from orpo_ray.config import ScaleConfig
from orpo_ray.errors import ConfigError


@dataclass(frozen=True)
class Nodes:
    """Machines that are all alike, and what a run takes of each."""

    count: int
    gpus: int
    cpus: int
    memory_gib: int


def nodes_for(
    scale: ScaleConfig, count: int, gpus: int | None, cpus: int, memory_gib: int
) -> Nodes:
    """Machines that hold a run's workers; GPUs per node follow from the workers unless given.

    Raises ConfigError where they cannot be told, or where the workers do not fit.
    """
    if scale.workers == "auto":
        if gpus is None:
            raise ConfigError(
                "scale.workers: auto takes what is there, which nobody knows before; "
                "give --gpus-per-node (0 trains on CPUs), or set scale.workers"
            )
        return Nodes(count, gpus, cpus, memory_gib)
    per_node = math.ceil(scale.workers / count)
    needed = math.ceil(per_node * _gpus_of_a_worker(scale, gpus))
    _refuse("--gpus-per-node", gpus, needed, per_node)
    _refuse("--cpus-per-node", cpus, math.ceil(per_node * scale.cpus_per_worker), per_node)
    return Nodes(count, needed if gpus is None else gpus, cpus, memory_gib)


def _gpus_of_a_worker(scale: ScaleConfig, gpus: int | None) -> float:
    """What `auto` comes to: one where there are GPUs, else none."""
    if scale.gpus_per_worker == "auto":
        return 0.0 if gpus == 0 else 1.0
    return scale.gpus_per_worker


def _refuse(option: str, given: int | None, needed: int, workers: int) -> None:
    if given is not None and given < needed:
        raise ConfigError(
            f"{option}: {given} are too few for the {workers} workers of a node, which take "
            f"{needed}"
        )
