"""Decides where a run's workers go, before anything else starts.

It imports no torch, so that a refusal comes at once.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orpo_ray.config import ScaleConfig
from orpo_ray.config.training import DeepSpeedConfig
from orpo_ray.errors import ConfigError, ResourceError, SetupError
from orpo_ray.ray_runtime import (
    has_ray,
    has_ray_for_itself,
    joins_cluster,
    owns_ray,
    start_ray,
)
from orpo_ray.runs.console import Announce

_CPU_WORKERS = 2
"""What `workers: auto` means without a GPU."""
_LOOK_S = 1.0


@dataclass(frozen=True)
class Node:
    """A server of the cluster, with its CPUs and GPUs."""

    address: str
    cpus: float
    gpus: float
    is_driver: bool = False


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Workers that fit the cluster, and what each of them takes."""

    workers: int
    cpus: float
    """CPUs of each worker."""
    gpus: float
    """GPUs of each worker."""
    nodes: int
    """How many servers hold the workers."""
    uses_ray: bool
    """Whether Ray starts the workers. Without Ray this process is the one worker."""
    own_ray: bool = False
    """Whether the command has started Ray itself. Such a Ray ends with the command."""


def place(
    scale: ScaleConfig, announce: Announce, verbose: bool = False, beside_others: bool = False
) -> Placement:
    """Look at the cluster and place the workers there. Raises ResourceError if they do not fit.

    If no cluster is named, a single worker is this process. On a cluster Ray starts a single worker
    too. `beside_others` says that other runs of the same command take cores as well.
    """
    if scale.workers == 1 and not _asks_for_ray(scale) and not joins_cluster():
        cores = os.cpu_count() or 1
        if scale.least_cpus > cores:
            raise ResourceError(
                f"scale.cpus_per_worker: {scale.least_cpus:g}, but this machine has {cores} "
                "CPU; lower it"
            )
        return Placement(
            workers=1,
            cpus=scale.least_cpus,
            gpus=_local_gpus(scale),
            nodes=1,
            uses_ray=False,
        )
    _refuse_first_ray_train()
    if not joins_cluster() and not has_ray():
        announce("starting Ray on this machine")
    start_ray(verbose=verbose)
    nodes = cluster_nodes()
    placement = replace(fit(scale, nodes), own_ray=owns_ray())
    if joins_cluster():  # the cluster would not count the CPUs that this process takes
        placement = replace(placement, uses_ray=True)
    if scale.cpus_per_worker == "auto" and has_ray_for_itself() and not beside_others:
        placement = share_cores(placement, nodes[0].cpus)
    if scale.workers == "auto" or placement.cpus > scale.least_cpus:
        what = (
            f"{placement.gpus:g} GPU each"
            if placement.gpus
            else f"{placement.cpus:g} CPU each, no GPU found"
        )
        announce(f"workers {placement.workers}: {what}")
    return placement


def _refuse_first_ray_train() -> None:
    """Raise ConfigError if the environment asks for Ray Train V1, which has another interface."""
    setting = os.environ.get("RAY_TRAIN_V2_ENABLED", "1")
    if setting.lower() not in ("1", "true"):
        raise ConfigError(
            f"RAY_TRAIN_V2_ENABLED={setting} in the environment turns off Ray Train V2, which "
            "training needs; unset it"
        )


def cluster_nodes() -> list[Node]:
    """The living servers of the Ray cluster, with all that each has, in use or not."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return [
        Node(
            address=node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            is_driver=node["NodeID"] == here,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def fit(scale: ScaleConfig, nodes: Sequence[Node]) -> Placement:
    """Decide how many workers there are, and what each takes. Pure.

    Raises ResourceError if they do not fit.
    """
    gpus = (
        float(any(node.gpus for node in nodes))
        if scale.gpus_per_worker == "auto"
        else scale.gpus_per_worker
    )
    cpus = scale.least_cpus
    room = [_room(node, cpus, gpus) for node in nodes]
    auto = max(1, sum(room) if gpus else min(_CPU_WORKERS, sum(room)))
    wanted = auto if scale.workers == "auto" else scale.workers
    if wanted > sum(room):
        asked = _asked(wanted, cpus, gpus)
        has = "; ".join(f"{node.address}: {node.cpus:g} CPU, {node.gpus:g} GPU" for node in nodes)
        # A GPU that its driver does not show is none for Ray.
        kind = SetupError if gpus else ResourceError
        raise kind(
            f"scale.workers: {asked} were asked for, but there is room for {sum(room)} ({has}); "
            "lower scale.workers, scale.cpus_per_worker or scale.gpus_per_worker"
        )
    on_driver = any(node.is_driver and fits for node, fits in zip(nodes, room, strict=True))
    return Placement(
        workers=wanted,
        cpus=cpus,
        gpus=gpus,
        nodes=_nodes_for(wanted, room),
        uses_ray=wanted > 1 or _asks_for_ray(scale) or not on_driver,
    )


def share_cores(placement: Placement, cores: float) -> Placement:
    """Give each worker an equal part of a machine's cores, unless it has a GPU. Pure."""
    if placement.gpus:
        return placement
    return replace(placement, cpus=max(placement.cpus, float(cores // placement.workers)))


def wait_for_room(
    placement: Placement,
    queue_timeout: float,
    announce: Announce,
    free: Callable[[], Sequence[Node]],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until the workers' CPUs and GPUs are free, and announce the wait.

    `free` returns what each server has free at the moment. Raises ResourceError if others hold
    the CPUs and GPUs for `queue_timeout` seconds.
    """
    began, announced = clock(), ""
    while True:
        nodes = free()
        if sum(_room(node, placement.cpus, placement.gpus) for node in nodes) >= placement.workers:
            if announced:
                announce(f"there is room now, after {clock() - began:.0f} s")
            return
        has = "; ".join(f"{node.address}: {node.cpus:g} CPU, {node.gpus:g} GPU" for node in nodes)
        waits = f"{_asked(placement.workers, placement.cpus, placement.gpus)}; free are {has}"
        if clock() - began >= queue_timeout:
            raise ResourceError(
                f"scale.queue_timeout: no room within {queue_timeout:g} s for {waits}; "
                "others use the cluster (`orpo-ray status`)"
            )
        if waits != announced:
            announce(f"the cluster is busy; waiting for room for {waits}")
            announced = waits
        sleep(_LOOK_S)


def free_nodes() -> list[Node]:
    """The living servers of the cluster, with the CPUs and GPUs that are free."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [
        Node(
            address=node["NodeManagerAddress"],
            cpus=free.get(node["NodeID"], {}).get("CPU", 0.0),
            gpus=free.get(node["NodeID"], {}).get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def runs_at_once(placement: Placement, nodes: Sequence[Node]) -> int:
    """How many runs of such a placement the cluster holds at once. Pure."""
    return max(
        1, sum(_room(node, placement.cpus, placement.gpus) for node in nodes) // placement.workers
    )


def _asked(workers: int, cpus: float, gpus: float) -> str:
    gpu = f" and {gpus:g} GPU" if gpus else ""
    return f"{workers} {'workers' if workers > 1 else 'worker'} with {cpus:g} CPU{gpu} each"


def _asks_for_ray(scale: ScaleConfig) -> bool:
    """Whether Ray must start even a single worker.

    DeepSpeed needs a process group for one worker too, and Ray Train sets one up.
    """
    return scale.ray or isinstance(scale.deepspeed, DeepSpeedConfig)


def _room(node: Node, cpus: float, gpus: float) -> int:
    """How many workers a server holds."""
    rounding = 1e-9
    by_cpu = int(node.cpus / cpus + rounding)
    return min(by_cpu, int(node.gpus / gpus + rounding)) if gpus else by_cpu


def _nodes_for(workers: int, room: Sequence[int]) -> int:
    """The least number of servers that hold so many workers, which is how Ray packs them."""
    held = 0
    for count, fits in enumerate(sorted(room, reverse=True), start=1):
        held += fits
        if held >= workers:
            return count
    raise AssertionError("checked before: the workers fit")


def _local_gpus(scale: ScaleConfig) -> float:
    """GPUs that this process would train on. `auto` counts as one, since only torch can tell."""
    return 1.0 if scale.gpus_per_worker == "auto" else scale.gpus_per_worker
