"""What all parts of a run need while it trains."""

from dataclasses import dataclass

from orpo_ray.data.store import Artifact
from orpo_ray.runs.console import Announce
from orpo_ray.runs.run import Run
from orpo_ray.training.decisions import Setup
from orpo_ray.training.plan import Indices
from orpo_ray.training.reporter import Reporter
from orpo_ray.training.world import World


@dataclass(frozen=True, kw_only=True)
class Session:
    """A process of a run: its inputs, its place in the world, and to whom it speaks."""

    run: Run
    artifact: Artifact
    setup: Setup
    reporter: Reporter
    announce: Announce
    world: World
    steps: list[Indices]
    """The pairs of each optimizer step."""
