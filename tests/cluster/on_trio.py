"""Commands given on a fourth machine, next to the three servers, and their results."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from project import write_project
from support import ENVIRONMENT, HANG_S, Done


def cluster(command: str, hosts: Path, *options: str, code: int = 0) -> Any:
    """The result of a command about the cluster."""
    done = Given("cluster", command, hosts, *options, "--json").end()
    assert done.code == code, done.err
    return done.result


class Given:
    """A running `orpo-ray` command."""

    def __init__(self, *words: object, cwd: Path | None = None, **variables: str) -> None:
        command = [sys.executable, "-m", "orpo_ray.cli.main", *map(str, words)]
        self._process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**ENVIRONMENT, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def end(self) -> Done:
        """Wait for it."""
        out, err = self._process.communicate(timeout=HANG_S)
        return Done(self._process.returncode, out, err)


def project(folder: Path) -> Path:
    """A run of two workers, which need two servers; all servers share its storage."""
    training = {"max_steps": 6, "eval_every": 3, "checkpoint_every": 3}
    return write_project(
        folder / "here",
        str(folder / "shared"),
        "demo",
        160,
        training,
        {"workers": 2, "cpus_per_worker": 2},
    )
