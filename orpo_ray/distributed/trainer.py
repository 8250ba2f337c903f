"""Ray's trainer without the helper processes that a run of ours has no work for.

Each of Ray's actors wakes a hundred times a second, work or none, and where workers fill their cores each time one of
them is put aside (docs/benchmarks.md). The seams are private to Ray: a test counts the processes of a run.
"""

import warnings
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy


class LeanTrainer(DataParallelTrainer):
    """No dataset manager: the pairs are read from storage.

    `owns_ray`: the command has started Ray, which ends with it. Then no cleaner of placement groups
    is needed, whose work `launch` does while the command lives, and nobody who would add servers.
    """

    def __init__(self, *args: Any, owns_ray: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self._owns_ray = owns_ray

    def _create_default_callbacks(self) -> list[Any]:
        idle = (DatasetsCallback, PlacementGroupCleanerCallback) if self._owns_ray else (DatasetsCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, idle)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if self._owns_ray:
            options["scaling_policy"] = _NoAutoscaler(self.scaling_config)
        return super()._initialize_and_run_controller(**options)


class _NoAutoscaler(FixedScalingPolicy):
    """Asks nobody for the workers' servers."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nobody to introduce the run to."""

    def _maybe_send_resource_request(self) -> None:
        """Nobody to ask."""
