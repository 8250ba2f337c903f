"""Which of Ray Train's helper processes a run starts; how many there really are is counted in a run of its own."""

import pytest

from orpo_ray.distributed.trainer import LeanTrainer


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
