"""What each process of a run is told, wherever Ray starts it."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from orpo_ray.config import RunConfig, load_resolved
from orpo_ray.config.storage import inside
from orpo_ray.data.store import MANIFEST, Artifact, open_artifact
from orpo_ray.errors import ConfigError
from orpo_ray.storage import fetched, fetched_folder, storage_at
from orpo_ray.training.decisions import Setup
from orpo_ray.training.record import CONFIG_FILE


@dataclass(frozen=True)
class Task:
    """Where resolved config and pairs lie, and what was settled.

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
