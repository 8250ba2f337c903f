"""What runs in each Ray Train worker: the training loop, with a reporter that speaks to the driver."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train.torch
import torch

from orpo_ray.config.storage import local_path
from orpo_ray.data.store import Artifact, open_artifact
from orpo_ray.distributed.mailbox import Message
from orpo_ray.distributed.reporter import RayReporter
from orpo_ray.distributed.task import Task
from orpo_ray.errors import RunError
from orpo_ray.storage import storage_at
from orpo_ray.training import loop
from orpo_ray.training.record import RUN_FILE, WORKERS_LOCK_FILE, lock_within
from orpo_ray.training.reporter import LocalReporter
from orpo_ray.training.world import World, current_world

_PREDECESSORS_S = 60.0


def work(task: Task, mailbox: Any) -> None:
    """Train as one of the group, telling the driver of `mailbox`.

    Ray Train has set up torch.distributed before.
    """
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
