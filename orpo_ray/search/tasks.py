"""Work that needs a model, in a Ray task with the resources of one worker."""

import math
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from orpo_ray.distributed.launch import free_what_dead_controllers_hold
from orpo_ray.distributed.run import Ground
from orpo_ray.errors import ResourceError, RunError, StoppedError, on_one_line
from orpo_ray.ray_runtime import ROOM_S
from orpo_ray.runs.console import Console

_POLL_S = 1.0


def on_a_worker(
    ground: Ground, console: Console, work: Callable[..., Any], *arguments: object
) -> Any:
    """What `work` returns on a worker of `ground`.

    Raises StoppedError on request, ResourceError if no resources become free in time, and RunError
    if the work fails.
    """
    resources = {"num_cpus": ground.placement.cpus, "num_gpus": ground.placement.gpus}
    # An empty task first. It shows whether the resources become free in time.
    _wait(ray.remote(lambda: None).options(**resources).remote(), console, ROOM_S)
    return _wait(ray.remote(work).options(**resources).remote(*arguments), console)


def _wait(pending: Any, console: Console, seconds: float = math.inf) -> Any:
    """The result of a Ray task, unless the user stops first or the time is up."""
    give_up = time.monotonic() + seconds
    while not ray.wait([pending], timeout=_POLL_S)[0]:
        if console.stop_requested():
            raise StoppedError(
                "stopped after all runs ended; the same command generates their answers"
            )
        if time.monotonic() > give_up:
            raise ResourceError(
                f"no resources for one worker became free within {seconds:g} s; is the cluster "
                "busy?"
            )
        # Trials that were given up last may still hold resources.
        free_what_dead_controllers_hold()
    try:
        return ray.get(pending)
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        raise RunError(f"{type(cause).__name__}: {on_one_line(cause)}") from error
