"""What runs in each Ray Train worker: the training loop, with a reporter that speaks to the driver."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train.torch
import torch

from orpo_ray.config import RunConfig, load_resolved
from orpo_ray.config.storage import inside, local_path
from orpo_ray.data.store import MANIFEST, Artifact, open_artifact
from orpo_ray.distributed.mailbox import Message
from orpo_ray.distributed.reporter import RayReporter
from orpo_ray.errors import ConfigError, RunError
from orpo_ray.storage import fetched, fetched_folder, storage_at
from orpo_ray.training import loop
from orpo_ray.training.record import CONFIG_FILE, RUN_FILE, WORKERS_LOCK_FILE, lock_within
from orpo_ray.training.reporter import LocalReporter
from orpo_ray.training.setup import Setup
from orpo_ray.training.world import World, current_world

_PREDECESSORS_S = 60.0


@dataclass(frozen=True)
class Task:
    """What a process of a run is told, wherever Ray starts it: where resolved config and pairs lie, what was settled.

    `config` and `artifact` are places, for which a server may have paths of its own. `directory` is where the command
    was given: relative paths in the config start there.
    """

    config: str
    artifact: str
    setup: Setup
    directory: Path

    def enter(self) -> RunConfig:
        """The config, its relative paths meaning what they mean to the driver on servers that have its folder.

        Raises ConfigError on a server that does not see what the driver wrote.
        """
        if self.directory.is_dir():
            os.chdir(self.directory)
        path = fetched(self.config)
        if not path.exists():
            storage = path.parent.parent
            raise ConfigError(
                f"storage: {storage} is not seen on server {platform.node()}; use a folder that every server sees"
            )
        return load_resolved(path)

    def pairs(self) -> Artifact:
        """The prepared pairs, fetched if they are kept elsewhere."""
        return open_artifact(fetched_folder(self.artifact, MANIFEST))


def task_of(config: RunConfig, artifact: Artifact, setup: Setup) -> Task:
    """The task of a run whose command is given here."""
    artifact_place = storage_at(config.storage).place_of(artifact.path)
    return Task(inside(config.place, CONFIG_FILE), artifact_place, setup, Path.cwd())


def train_worker(settings: dict[str, Any]) -> None:
    """Train as one of the group; Ray Train has set up torch.distributed before it calls this.

    `settings`: the `task`, and the `mailbox` whose driver is told.
    """
    task, mailbox = settings["task"], settings["mailbox"]
    config = task.enter()
    world = current_world()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)

    def announce(line: str) -> None:
        if world.is_first:
            mailbox.post.remote(Message("announce", line))

    storage = storage_at(config.storage)
    local = LocalReporter(config.run_dir, keep=config.training.keep, announce=announce, storage=storage)
    with _only_group(config.run_dir, world):
        if world.is_first:
            storage.fetch(config.run_dir / RUN_FILE)
        reporter = RayReporter(local, world, mailbox, storage)
        loop.train(config, _pairs_on_each_server(task, world), task.setup, reporter, announce)


def _pairs_on_each_server(task: Task, world: World) -> Artifact:
    """The pairs, which one process of a server fetches for all."""
    if world.local_rank == 0:
        task.pairs()
    world.wait()
    return open_artifact(local_path(task.artifact))


@contextmanager
def _only_group(run_dir: Path, world: World) -> Iterator[None]:
    """Keep workers apart from those of an earlier start whose driver is dead, and who have not noticed yet."""
    if not world.is_first:
        yield
        return
    with (run_dir / WORKERS_LOCK_FILE).open("w") as file:
        if not lock_within(file.fileno(), _PREDECESSORS_S):
            raise RunError(f"{run_dir}: workers of an earlier start are still writing there; end them first")
        yield
