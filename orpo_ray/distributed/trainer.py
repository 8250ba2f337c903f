"""Ray's trainer without the helper processes that a run of ours has no work for.

Each of Ray's actors wakes a hundred times a second, work or none, and where workers fill their
cores each time one of them is put aside (docs/benchmarks.md). The seams are private to Ray: a test
counts the processes of a run.
"""

import atexit
import os
import sys
import warnings
from typing import Any

from orpo_ray.lean_imports import without_collections

with warnings.catch_warnings(), without_collections():  # in Ray's controller, too
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
    """No dataset manager: the pairs are read from storage.

    `owns_ray`: the command has started Ray, which ends with it. Then no cleaner of placement groups
    is needed, whose work `launch` does while the command lives, and nobody who would add servers.
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
        """As Ray does it in a thread that hears no signals; who holds the controller may `end`
        it.
        """
        scaling: Any = self.scaling_config  # typed as that of Ray's first Train
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
        """End the controller where it is at work, and with it the workers."""
        controller = self._controller
        if controller is not None:
            ray.kill(controller)


class _Workers(WorkerGroup):
    """Wait for each other's news as long as Ray does, however often the controller looks.

    The error of a worker that has lost another one is known at once; that the other one died,
    later.
    """

    def poll_status(self, timeout: float | None = None) -> Any:
        """What each worker says, once all have answered or the time is over."""
        return super().poll_status(max(timeout or 0.0, _POLL_TIMEOUT_S))


class TrainController(RaysController):
    """Ray's, with workers and an end of ours; the name is what lists of processes show."""

    worker_group_cls = _Workers

    def __init__(self, *args: Any, **options: Any) -> None:
        atexit.register(leave_at_once)
        super().__init__(*args, **options)


def leave_at_once() -> None:
    """End the controller's process, whose work is done, without Ray's own exit handlers.

    They can wait for themselves for ever (2.60: a publisher that is destroyed posts to the queue
    whose end destroys it), and leave an idle process behind.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class _NoAutoscaler(FixedScalingPolicy):
    """Asks nobody for the workers' servers."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nobody to introduce the run to."""

    def _maybe_send_resource_request(self) -> None:
        """Nobody to ask."""
