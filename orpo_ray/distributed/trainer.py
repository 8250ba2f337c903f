"""Ray's trainer without the helper processes that have no work in our runs.

Each of Ray's actors wakes a hundred times a second, even without work. If the workers fill their
cores, each time a worker is interrupted (docs/benchmarks.md). The names used here are private to
Ray, so a test counts the processes of a run.
"""

import atexit
import os
import sys
import warnings
from typing import Any

from orpo_ray.lean_imports import without_collections

with warnings.catch_warnings(), without_collections():  # Ray's controller imports this too
    warnings.simplefilter("ignore")
    import ray
    from ray._common.constants import (
        RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR as WARNS_OF_BLOCKING,
    )
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )
    from ray.train.v2._internal.constants import get_env_vars_to_propagate
    from ray.train.v2._internal.execution.controller import TrainController as RaysController
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
    from ray.train.v2._internal.execution.worker_group import WorkerGroup
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

_POLL_TIMEOUT_S = 2.0


class LeanTrainer(DataParallelTrainer):
    """Ray's trainer without a dataset manager, since workers read the pairs from storage.

    `owns_ray`: the command has started Ray, which ends with it. Then two more helpers are left out.
    One cleans up placement groups, which `launch` does while the command runs. The other would add
    servers.
    """

    def __init__(self, *args: Any, owns_ray: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self._owns_ray = owns_ray
        self._controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        idle = (
            (DatasetsCallback, PlacementGroupCleanerCallback)
            if self._owns_ray
            else (DatasetsCallback,)
        )
        return [
            callback
            for callback in super()._create_default_callbacks()
            if not isinstance(callback, idle)
        ]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        """Start the controller and wait for it, as Ray does in a thread without signals.

        The controller is kept, so that `end` can end it.
        """
        scaling: Any = self.scaling_config  # its type is that of Ray Train V1
        if self._owns_ray:
            options["scaling_policy"] = _NoAutoscaler(scaling)
        raylet: Any = ray._raylet
        here = ray.get_runtime_context().get_node_id()
        controller = ray.remote(TrainController).options(
            num_cpus=0,
            label_selector={raylet.RAY_NODE_ID_KEY: here},
            runtime_env={"env_vars": {WARNS_OF_BLOCKING: "0", **get_env_vars_to_propagate()}},
        )
        self._controller = controller.remote(**options)
        try:
            ray.get(self._controller.run.remote())
            return ray.get(self._controller.get_result.remote())
        finally:
            self._controller = None

    def end(self) -> None:
        """End the controller, if it runs, and the workers with it."""
        controller = self._controller
        if controller is not None:
            ray.kill(controller)


class _Workers(WorkerGroup):
    """Ray's workers, with Ray's own time to answer, however often the controller looks.

    When a worker dies, another worker's lost connection is known at once, and the death itself only
    later. With less time only the lost connection would be seen.
    """

    def poll_status(self, timeout: float | None = None) -> Any:
        """What each worker says, once all have answered or the time is over."""
        return super().poll_status(max(timeout or 0.0, _POLL_TIMEOUT_S))


class TrainController(RaysController):
    """Ray's controller with our workers and our exit. Its name shows in lists of processes."""

    worker_group_cls = _Workers

    def __init__(self, *args: Any, **options: Any) -> None:
        atexit.register(leave_at_once)
        super().__init__(*args, **options)


def leave_at_once() -> None:
    """End the controller's process when its work is done, without Ray's own exit handlers.

    Those can deadlock and leave an idle process behind. In Ray 2.60 a publisher that is destroyed
    posts to the queue whose end destroys it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class _NoAutoscaler(FixedScalingPolicy):
    """Never asks Ray's autoscaler for servers, since there is none."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Do nothing; there is no autoscaler to register with."""

    def _maybe_send_resource_request(self) -> None:
        """Do nothing; there is no autoscaler to ask."""
