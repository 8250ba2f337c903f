"""What each process of a run is told, wherever Ray starts it."""

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
    """Where resolved config and pairs lie, and what was settled.

    `config` and `artifact` are places, for which a server may have paths of its own. `directory` is
    where the command was given: relative paths in the config start there.
    """

    config: str
    artifact: str
    setup: Setup
    directory: Path

    def enter(self) -> Run:
        """The run, the relative paths in its config read as the driver reads them, where a server
        has its folder.

        Raises ConfigError on a server that does not see what the driver wrote.
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
        """The prepared pairs, fetched if they are kept elsewhere."""
        return open_artifact(fetched_folder(self.artifact, MANIFEST))


def task_of(run: Run, artifact: Artifact, setup: Setup) -> Task:
    """The task of a run whose command is given here."""
    return Task(run.place_of(CONFIG_FILE), run.storage.place_of(artifact.path), setup, Path.cwd())
