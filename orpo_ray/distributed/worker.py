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
from orpo_ray.data.store import Artifact, open_artifact
from orpo_ray.distributed.mailbox import Message
from orpo_ray.distributed.reporter import RayReporter
from orpo_ray.errors import ConfigError, RunError
from orpo_ray.training import loop
from orpo_ray.training.record import CONFIG_FILE, lock_within
from orpo_ray.training.reporter import LocalReporter
from orpo_ray.training.setup import Setup
from orpo_ray.training.world import World, current_world

_LOCK_FILE = ".workers.lock"
_PREDECESSORS_S = 60.0


@dataclass(frozen=True)
class Task:
    """What a process of a run is told, wherever Ray starts it: where resolved config and pairs lie, what was settled.

    `directory` is where the command was given: relative paths in the config start there.
    """

    config: Path
    artifact: Path
    setup: Setup
    directory: Path

    def enter(self) -> RunConfig:
        """The config, its relative paths meaning what they mean to the driver on servers that have its folder.

        Raises ConfigError on a server that does not see what the driver wrote.
        """
        if self.directory.is_dir():
            os.chdir(self.directory)
        if not self.config.exists():
            storage = self.config.parent.parent
            raise ConfigError(
                f"storage: {storage} is not seen on server {platform.node()}; use a folder that every server sees"
            )
        return load_resolved(self.config)


def task_of(config: RunConfig, artifact: Artifact, setup: Setup) -> Task:
    """The task of a run whose command is given here."""
    return Task(config.run_dir / CONFIG_FILE, artifact.path, setup, Path.cwd())


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

    local = LocalReporter(config.run_dir, keep=config.training.keep, announce=announce)
    with _only_group(config.run_dir, world):
        reporter = RayReporter(local, world, mailbox)
        loop.train(config, open_artifact(task.artifact), task.setup, reporter, announce)


@contextmanager
def _only_group(run_dir: Path, world: World) -> Iterator[None]:
    """Keep workers apart from those of an earlier start whose driver is dead, and who have not noticed yet."""
    if not world.is_first:
        yield
        return
    with (run_dir / _LOCK_FILE).open("w") as file:
        if not lock_within(file.fileno(), _PREDECESSORS_S):
            raise RunError(f"{run_dir}: workers of an earlier start are still writing there; end them first")
        yield
