"""A run on workers from its prepared pairs to its end: settled, its reference log-probs computed, trained."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from orpo_ray.config import RunConfig
from orpo_ray.data.store import Artifact
from orpo_ray.distributed import launch, references
from orpo_ray.distributed.preflight import Placement, place
from orpo_ray.models.hardware import Hardware
from orpo_ray.storage import storage_at
from orpo_ray.training import record
from orpo_ray.training.decisions import Setup
from orpo_ray.training.reporter import Watch
from orpo_ray.training.setup import Announce, settle


@dataclass(frozen=True)
class Ground:
    """What runs stand on that differ in their settings only: the same pairs, room and kind of device."""

    artifact: Artifact
    placement: Placement
    hardware: Hardware


def train_on(
    ground: Ground,
    config: RunConfig,
    announce: Announce,
    watch: Watch,
    stop_requested: Callable[[], bool],
    poll_s: float = 1.0,
) -> None:
    """Settle what is open, then train on the workers of `ground`. Raises what the run fails with.

    `watch` and `announce` are called in this thread, at most `poll_s` seconds after the news.
    """
    driver = _driver(ground, config, announce, watch, stop_requested, poll_s)
    placement, setup = _prepare(ground, config, driver)
    launch.train(config, ground.artifact, setup, placement, driver)


def prepare_on(ground: Ground, config: RunConfig, announce: Announce, stop_requested: Callable[[], bool]) -> None:
    """Settle a run and have its reference log-probs in the cache, for others that will need the same ones."""
    _prepare(ground, config, _driver(ground, config, announce, lambda step, total_steps, metrics: None, stop_requested))


def _prepare(ground: Ground, config: RunConfig, driver: launch.Driver) -> tuple[Placement, Setup]:
    setup = _settle(ground.placement, ground, config, driver.announce)
    return references.prepare_references(config, ground.artifact, setup, ground.placement, driver)


def _settle(placement: Placement, ground: Ground, config: RunConfig, announce: Announce) -> Setup:
    return settle(config, ground.artifact, announce, ground.hardware, placement.workers, placement.nodes)


def _driver(
    ground: Ground,
    config: RunConfig,
    announce: Announce,
    watch: Watch,
    stop_requested: Callable[[], bool],
    poll_s: float = 1.0,
) -> launch.Driver:
    def place_again() -> tuple[Placement, Setup]:
        # This process may be a trial's, which does not see who started Ray.
        found = replace(place(config.scale, announce), own_ray=ground.placement.own_ray)
        # The first worker may have written on another server what the run began with.
        record.fetch_run(config.run_dir, storage_at(config.storage))
        return found, _settle(found, ground, config, announce)

    return launch.Driver(announce, watch, stop_requested, place_again, poll_s)
