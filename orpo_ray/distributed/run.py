"""Takes a run on workers from its prepared pairs to its end."""

from dataclasses import dataclass, replace
from typing import Any

from orpo_ray.data.store import Artifact
from orpo_ray.distributed import launch, references
from orpo_ray.distributed.driver import Driver
from orpo_ray.distributed.preflight import Placement, place
from orpo_ray.models.hardware import Hardware
from orpo_ray.runs.console import Console
from orpo_ray.runs.files import RESULT_FILE, RUN_FILE
from orpo_ray.runs.run import Run
from orpo_ray.training.decisions import Setup
from orpo_ray.training.setup import settle


@dataclass(frozen=True)
class Ground:
    """What runs share that differ only in their settings: pairs, placement and hardware."""

    artifact: Artifact
    placement: Placement
    hardware: Hardware


def train_on(
    ground: Ground,
    run: Run,
    console: Console,
    poll_s: float = 1.0,
    planned: dict[str, Any] | None = None,
) -> None:
    """Decide what is open, then train on the workers of `ground`. Raises the run's error.

    `planned` is what the planner expects, for run.json. At the end, run.json and result.json are on
    this server. The console is called in this thread, at most `poll_s` seconds after the news.
    """
    driver = replace(_driver(ground, run, console, planned), poll_s=poll_s)
    references.prepare_references(driver)
    launch.train(driver)
    for name in (RUN_FILE, RESULT_FILE):
        run.fetch(name)  # the first worker may have written them on another server


def prepare_on(ground: Ground, run: Run, console: Console) -> None:
    """Fill the cache of reference log-probs with those of a run, which other runs will need too."""
    references.prepare_references(_driver(ground, run, console))


def _driver(
    ground: Ground, run: Run, console: Console, planned: dict[str, Any] | None = None
) -> Driver:
    artifact, hardware = ground.artifact, ground.hardware

    def settled(found: Placement) -> Setup:
        return settle(
            run,
            artifact,
            console.announce,
            hardware,
            workers=found.workers,
            nodes=found.nodes,
            owns_machine=found.own_ray,
            planned=planned,
        )

    def look_again() -> tuple[Placement, Setup]:
        # If this is the process of a trial, `place` cannot see that our search started Ray.
        found = replace(place(run.config.scale, console.announce), own_ray=ground.placement.own_ray)
        run.refresh()  # the first worker may have written run.json on another server
        return found, settled(found)

    return Driver(
        run=run,
        artifact=artifact,
        console=console,
        placement=ground.placement,
        setup=settled(ground.placement),
        look_again=look_again,
    )
