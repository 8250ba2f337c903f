"""A run on workers from its prepared pairs to its end: settled, its reference log-probs computed,
trained.
"""

from dataclasses import dataclass, replace

from orpo_ray.data.store import Artifact
from orpo_ray.distributed import launch, references
from orpo_ray.distributed.driver import Driver
from orpo_ray.distributed.preflight import Placement, place
from orpo_ray.models.hardware import Hardware
from orpo_ray.runs.console import Console
from orpo_ray.runs.run import Run
from orpo_ray.training.decisions import Setup
from orpo_ray.training.setup import settle


@dataclass(frozen=True)
class Ground:
    """What runs stand on that differ in their settings only: the same pairs, room and kind of
    device.
    """

    artifact: Artifact
    placement: Placement
    hardware: Hardware


def train_on(ground: Ground, run: Run, console: Console, poll_s: float = 1.0) -> None:
    """Settle what is open, then train on the workers of `ground`. Raises what the run fails with.

    The console hears in this thread, at most `poll_s` seconds after the news.
    """
    driver = _driver(ground, run, console, poll_s)
    references.prepare_references(driver)
    launch.train(driver)


def prepare_on(ground: Ground, run: Run, console: Console) -> None:
    """Settle a run and have its reference log-probs in the cache, for others that will need the
    same ones.
    """
    references.prepare_references(_driver(ground, run, console))


def _driver(ground: Ground, run: Run, console: Console, poll_s: float = 1.0) -> Driver:
    artifact, hardware = ground.artifact, ground.hardware

    def settled(found: Placement) -> Setup:
        return settle(
            run,
            artifact,
            console.announce,
            hardware,
            workers=found.workers,
            nodes=found.nodes,
        )

    def look_again() -> tuple[Placement, Setup]:
        # This process may be a trial's, which does not see who started Ray.
        found = replace(place(run.config.scale, console.announce), own_ray=ground.placement.own_ray)
        run.refresh()  # the first worker may have written on another server what the run began with
        return found, settled(found)

    return Driver(
        run=run,
        artifact=artifact,
        console=console,
        placement=ground.placement,
        setup=settled(ground.placement),
        look_again=look_again,
        poll_s=poll_s,
    )
