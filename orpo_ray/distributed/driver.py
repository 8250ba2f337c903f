"""What the driver of one run on workers knows."""

from collections.abc import Callable
from dataclasses import dataclass

from orpo_ray.data.store import Artifact
from orpo_ray.distributed.preflight import Placement
from orpo_ray.distributed.task import Task, task_of
from orpo_ray.runs.console import Console
from orpo_ray.runs.run import Run
from orpo_ray.training.decisions import Setup


@dataclass(kw_only=True)
class Driver:
    """One run and its workers' places, which change after a loss."""

    run: Run
    artifact: Artifact
    console: Console
    placement: Placement
    """Where the workers run."""
    setup: Setup
    """What was decided for the run on this placement."""
    look_again: Callable[[], tuple[Placement, Setup]]
    """Places the workers again, on what is left of the cluster, and decides again."""
    poll_s: float = 1.0
    """Seconds between two looks for news from the workers."""

    @property
    def task(self) -> Task:
        """What each process of the run needs to know."""
        return task_of(self.run, self.artifact, self.setup)

    def place_again(self) -> None:
        """Place the workers, after a loss, on what is left of the cluster."""
        self.placement, self.setup = self.look_again()
