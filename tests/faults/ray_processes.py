"""Runs of the real command whose processes can be identified."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_head import Processes
from support import ENVIRONMENT, HANG_S, POLL_S, wait_until


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    said: list[str]
    left: dict[int, str]
    """Processes that did not end with the command."""


class Command:
    """`orpo-ray train`, or another command on a config, in a session of its own."""

    def __init__(
        self,
        config: Path,
        *arguments: str,
        command: str = "train",
        environment: dict[str, str] | None = None,
    ) -> None:
        self.processes = Processes()
        self._folder = Path(tempfile.mkdtemp(prefix="orpo-command-"))
        with (self._folder / "out").open("w") as out, (self._folder / "err").open("w") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "orpo_ray.cli.main", command, str(config), *arguments],
                env={**ENVIRONMENT, **(environment or {}), **self.processes.environment},
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The driver's process, and its group."""
        return self._process.pid

    def wait_until(self, happens: Callable[[], Any], what: str) -> Any:
        """The first true value of a condition; the command must not end before it."""

        def asked() -> Any:
            found = happens()
            assert found or self._process.poll() is None, f"ended before {what}: {self.said()}"
            return found

        try:
            return wait_until(asked, what)
        except BaseException:
            self.processes.end()  # Ray of a failed test would take the cores of the next ones
            raise

    def said(self) -> str:
        """What the command has said to the user so far."""
        return self._text("err")

    def send(self, number: signal.Signals, to_group: bool = False) -> None:
        """Send a signal to the driver, or to the whole group as a terminal does."""
        (os.killpg if to_group else os.kill)(self.pid, number)

    def hold(self) -> bool:
        """Hold runs at their next evaluation or checkpoint; returns whether one is held."""
        return self.processes.hold()

    def release(self) -> None:
        """Release runs that are held."""
        self.processes.release()

    def end(self) -> Ended:
        """Wait for the end of the command and of all processes that it started."""
        try:
            code = self._process.wait(HANG_S)
            deadline = time.monotonic() + HANG_S
            while (left := self.processes.left()) and time.monotonic() < deadline:
                time.sleep(POLL_S)
        finally:
            self.processes.end()
            self._process.wait()
        ended = Ended(code, self._text("out"), self.said().splitlines(), left)
        shutil.rmtree(self._folder)
        return ended

    def _text(self, name: str) -> str:
        return (self._folder / name).read_text(encoding="utf-8", errors="replace")


def run(config: Path, *arguments: str, environment: dict[str, str] | None = None) -> Ended:
    """A command from its start to its end."""
    return Command(config, *arguments, environment=environment).end()


def worker_pids(run_dir: Path) -> list[int]:
    """Pids of a run's latest workers by rank; none before they are ready."""
    path = run_dir / "run.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return list(content.get("workers", []))
