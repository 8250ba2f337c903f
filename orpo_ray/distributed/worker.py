"""Runs the training loop in a Ray Train worker, with a reporter that sends to the driver."""

from contextlib import nullcontext
from typing import Any

import ray.train.torch
import torch

from orpo_ray.config.storage import local_path
from orpo_ray.data.store import Artifact, open_artifact
from orpo_ray.distributed.mailbox import Message
from orpo_ray.distributed.reporter import RayReporter
from orpo_ray.distributed.task import Task
from orpo_ray.runs.console import SILENT, Console
from orpo_ray.runs.files import RUN_FILE
from orpo_ray.training import loop
from orpo_ray.training.reporter import LocalReporter
from orpo_ray.training.world import World, current_world

_PREDECESSORS_S = 60.0


class _MailConsole(Console):
    """Sends announcements to the driver's mailbox; all other news goes through the reporter."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def announce(self, line: str) -> None:
        """Post a line."""
        self._mailbox.post.remote(Message("announce", line))


def work(task: Task, mailbox: Any) -> None:
    """Train as one worker of the group, with news to the driver's `mailbox`.

    Ray Train has set up torch.distributed before this is called.
    """
    run = task.enter()
    world = current_world()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    console = _MailConsole(mailbox) if world.is_first else SILENT
    with run.only_group(_PREDECESSORS_S) if world.is_first else nullcontext():
        if world.is_first:
            run.fetch(RUN_FILE)
        reporter = RayReporter(LocalReporter(run, console), world, mailbox)
        loop.train(run, _pairs_on_each_server(task, world), task.setup, reporter, console.announce)


def _pairs_on_each_server(task: Task, world: World) -> Artifact:
    """The pairs, which one process of each server fetches for all of its processes."""
    if world.local_rank == 0:
        task.pairs()
    world.wait()
    return open_artifact(local_path(task.artifact))
