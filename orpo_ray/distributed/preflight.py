"""Where a run's workers go, decided before anything else starts; imports no torch, so that a
refusal comes at once.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orpo_ray.config import ScaleConfig
from orpo_ray.config.training import DeepSpeedConfig
from orpo_ray.errors import ConfigError, ResourceError
from orpo_ray.ray_runtime import joins_cluster, owns_ray, start_ray
from orpo_ray.runs.console import Announce

_CPU_WORKERS = 2
"""What `workers: auto` means where there is no GPU."""
_LOOK_S = 1.0


@dataclass(frozen=True)
class Node:
    """A server of the cluster: all it has, whether in use or not."""

    address: str
    cpus: float
    gpus: float
    is_driver: bool = False


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Workers that fit: what each takes, over how many servers, and whether Ray starts them.

    Without Ray the one worker is this very process. `own_ray`: the command has started Ray, which
    ends with it.
    """

    workers: int
    cpus: float
    gpus: float
    nodes: int
    uses_ray: bool
    own_ray: bool = False


def place(scale: ScaleConfig, announce: Announce, verbose: bool = False) -> Placement:
    """Look at the cluster and place the workers there. Raises ResourceError where they do not fit.

    One worker that no cluster was named for needs no look: it is this process. On a cluster Ray
    starts that one too.
    """
    if scale.workers == 1 and not _asks_for_ray(scale) and not joins_cluster():
        cores = os.cpu_count() or 1
        if scale.cpus_per_worker > cores:
            raise ResourceError(
                f"scale.cpus_per_worker: {scale.cpus_per_worker:g}, but this machine has {cores} "
                "CPU"
            )
        return Placement(
            workers=1,
            cpus=scale.cpus_per_worker,
            gpus=_local_gpus(scale),
            nodes=1,
            uses_ray=False,
        )
    _refuse_first_ray_train()
    start_ray(verbose=verbose)
    placement = replace(fit(scale, cluster_nodes()), own_ray=owns_ray())
    if joins_cluster():  # which counts what each run holds; this process would go uncounted
        placement = replace(placement, uses_ray=True)
    if scale.workers == "auto":
        what = (
            f"{placement.gpus:g} GPU each"
            if placement.gpus
            else f"{placement.cpus:g} CPU each, no GPU in sight"
        )
        announce(f"workers {placement.workers}: {what}")
    return placement


def _refuse_first_ray_train() -> None:
    """Raise ConfigError where the environment asks Ray for its first Train, which has another
    interface.
    """
    setting = os.environ.get("RAY_TRAIN_V2_ENABLED", "1")
    if setting.lower() not in ("1", "true"):
        raise ConfigError(
            f"RAY_TRAIN_V2_ENABLED={setting} in the environment turns off what training needs; "
            "unset it"
        )


def cluster_nodes() -> list[Node]:
    """The living servers of the Ray cluster that this process has joined."""
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
    """Decide what each worker takes and how many there are.

    Pure; raises ResourceError where they do not fit.
    """
    gpus = (
        float(any(node.gpus for node in nodes))
        if scale.gpus_per_worker == "auto"
        else scale.gpus_per_worker
    )
    cpus = scale.cpus_per_worker
    room = [_room(node, cpus, gpus) for node in nodes]
    auto = max(1, sum(room) if gpus else min(_CPU_WORKERS, sum(room)))
    wanted = auto if scale.workers == "auto" else scale.workers
    if wanted > sum(room):
        asked = _asked(wanted, cpus, gpus)
        has = "; ".join(f"{node.address}: {node.cpus:g} CPU, {node.gpus:g} GPU" for node in nodes)
        raise ResourceError(
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


def wait_for_room(
    placement: Placement,
    queue_timeout: float,
    announce: Announce,
    free: Callable[[], Sequence[Node]],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until the workers' CPUs and GPUs are free, saying what for; `free`: what each server has
    to give just now.

    Raises ResourceError where others hold them for `queue_timeout` seconds.
    """
    began, told = clock(), ""
    while True:
        nodes = free()
        if sum(_room(node, placement.cpus, placement.gpus) for node in nodes) >= placement.workers:
            if told:
                announce(f"there is room now, after {clock() - began:.0f} s")
            return
        has = "; ".join(f"{node.address}: {node.cpus:g} CPU, {node.gpus:g} GPU" for node in nodes)
        waits = f"{_asked(placement.workers, placement.cpus, placement.gpus)}; free are {has}"
        if clock() - began >= queue_timeout:
            raise ResourceError(
                f"scale.queue_timeout: no room within {queue_timeout:g} s for {waits}; "
                "others use the cluster (`orpo-ray status`)"
            )
        if waits != told:
            announce(f"the cluster is busy; waiting for room for {waits}")
            told = waits
        sleep(_LOOK_S)


def free_nodes() -> list[Node]:
    """The living servers of the cluster, with what nobody holds of them."""
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
    """How many runs of such a placement the cluster holds, those that span servers too. Pure."""
    return max(
        1, sum(_room(node, placement.cpus, placement.gpus) for node in nodes) // placement.workers
    )


def _asked(workers: int, cpus: float, gpus: float) -> str:
    gpu = f" and {gpus:g} GPU" if gpus else ""
    return f"{workers} {'workers' if workers > 1 else 'worker'} with {cpus:g} CPU{gpu} each"


def _asks_for_ray(scale: ScaleConfig) -> bool:
    """DeepSpeed wants a process group even for one worker, and Ray Train sets one up."""
    return scale.ray or isinstance(scale.deepspeed, DeepSpeedConfig)


def _room(node: Node, cpus: float, gpus: float) -> int:
    """Workers that a server holds."""
    rounding = 1e-9
    by_cpu = int(node.cpus / cpus + rounding)
    return min(by_cpu, int(node.gpus / gpus + rounding)) if gpus else by_cpu


def _nodes_for(workers: int, room: Sequence[int]) -> int:
    """The least number of servers that hold so many workers; Ray packs them so."""
    held = 0
    for count, fits in enumerate(sorted(room, reverse=True), start=1):
        held += fits
        if held >= workers:
            return count
    raise AssertionError("checked before: the workers fit")


def _local_gpus(scale: ScaleConfig) -> float:
    """GPUs that this process would train on; probed only by whoever loads torch."""
    return 1.0 if scale.gpus_per_worker == "auto" else scale.gpus_per_worker
