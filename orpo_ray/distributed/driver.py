"""The process that gave the command, as it drives one run on workers."""

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
    """Speaks to the user, hears a wish to stop, and looks at the cluster again after a loss."""

    run: Run
    artifact: Artifact
    console: Console
    placement: Placement
    """Where the workers go."""
    setup: Setup
    """What follows from it, and what else was settled."""
    look_again: Callable[[], tuple[Placement, Setup]]
    """Both of them on what is left of the cluster."""
    poll_s: float = 1.0
    """How often it looks for news."""

    @property
    def task(self) -> Task:
        """What each process of the run is told."""
        return task_of(self.run, self.artifact, self.setup)

    def place_again(self) -> None:
        """Go on, after a loss, where there is room."""
        self.placement, self.setup = self.look_again()
