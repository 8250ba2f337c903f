"""Which of Ray Train's helper processes a run starts; how many there really are is counted in a run
of its own.
"""

import pytest
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from orpo_ray.distributed.trainer import LeanTrainer, TrainController


def helpers(owns_ray: bool) -> set[str]:
    trainer = LeanTrainer(lambda: None, owns_ray=owns_ray)
    return {type(callback).__name__ for callback in trainer._create_default_callbacks()}


@pytest.mark.parametrize("owns_ray", [True, False])
def test_nobody_hands_out_datasets_that_no_run_has(owns_ray: bool) -> None:
    assert "DatasetsCallback" not in helpers(owns_ray)
    assert {"AcceleratorSetupCallback", "BackendSetupCallback"} <= helpers(owns_ray)


def test_what_a_dead_driver_had_reserved_on_a_cluster_is_cleaned_up() -> None:
    assert "PlacementGroupCleanerCallback" in helpers(owns_ray=False)
    assert "PlacementGroupCleanerCallback" not in helpers(owns_ray=True)


@pytest.mark.parametrize(("asked", "waits"), [(0.5, 2.0), (None, 2.0), (5.0, 5.0)])
def test_workers_that_have_just_died_are_heard_of_however_often_the_controller_looks(
    monkeypatch: pytest.MonkeyPatch, asked: float | None, waits: float
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(WorkerGroup, "poll_status", lambda self, timeout: waited.append(timeout))
    workers = object.__new__(TrainController.worker_group_cls)
    workers.poll_status(asked)
    assert waited == [waits]
