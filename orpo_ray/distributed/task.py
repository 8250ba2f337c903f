"""What each process of a run needs to know, on any server."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from orpo_ray.config import load_resolved
from orpo_ray.data.store import MANIFEST, Artifact, open_artifact
from orpo_ray.errors import ConfigError
from orpo_ray.runs.files import CONFIG_FILE
from orpo_ray.runs.run import Run
from orpo_ray.storage import fetched, fetched_folder
from orpo_ray.training.decisions import Setup


@dataclass(frozen=True)
class Task:
    """Where a run's config and pairs lie, and what was decided for it."""

    config: str
    """The place of the resolved config. Each server may have its own path for a place."""
    artifact: str
    """The place of the prepared pairs."""
    setup: Setup
    directory: Path
    """The folder in which the command was given. Relative paths in the config start there."""

    def enter(self) -> Run:
        """The run, after a change to the driver's folder if this server has it.

        Relative paths in the config then mean what they mean to the driver. Raises ConfigError if
        this server does not see what the driver wrote.
        """
        if self.directory.is_dir():
            os.chdir(self.directory)
        path = fetched(self.config)
        if not path.exists():
            storage = path.parent.parent
            raise ConfigError(
                f"storage: {storage} is not seen on server {platform.node()}; use a folder that "
                "every server sees"
            )
        return Run(load_resolved(path))

    def pairs(self) -> Artifact:
        """The prepared pairs, fetched if they are in a bucket."""
        return open_artifact(fetched_folder(self.artifact, MANIFEST))


def task_of(run: Run, artifact: Artifact, setup: Setup) -> Task:
    """The task of a run whose command was given in the current folder."""
    return Task(run.place_of(CONFIG_FILE), run.storage.place_of(artifact.path), setup, Path.cwd())
