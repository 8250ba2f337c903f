"""Runs of the real command whose processes can be told from all others, and a Ray head of one's own to join."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import ENVIRONMENT, HANG_S, POLL_S, wait_until

LEAVE_S = 20.0
"""All processes of a run that has ended are gone after a few seconds; more on a busy machine."""
ORPHANS_S = 75.0
"""Where the driver was killed, Ray's agents try for 60 seconds to tell a dead process of the raylet's death."""
_MARK = "ORPO_RAY_TEST_RUN"
_NO_ACTORS = ("IDLE", "DashboardAgent", "RuntimeEnvAgent")


@dataclass
class Processes:
    """All processes that inherit a mark in their environment: whatever a command started, however far down."""

    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def environment(self) -> dict[str, str]:
        """The mark, to be handed to the first of them."""
        return {_MARK: self.mark}

    def left(self) -> dict[int, str]:
        """Pid and command line of those that are alive."""
        sought = f"{_MARK}={self.mark}".encode()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if sought in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(folder.name)] = f"{_state(folder)} {command.strip()[:120]}"
            except OSError:
                continue
        return found

    def actors(self) -> list[str]:
        """Class names of the Ray actors among them."""
        titles = re.findall(r" ray::(\w+)", "\n".join(self.left().values()))
        return sorted(title for title in titles if title not in _NO_ACTORS)

    def pid_of_actor(self, title: str) -> int:
        """The one Ray actor of a class."""
        (pid,) = (pid for pid, command in self.left().items() if f" ray::{title}" in command)
        return pid

    def end(self) -> None:
        """Kill those that are left, each by its pid."""
        deadline = time.monotonic() + LEAVE_S
        while (left := self.left()) and time.monotonic() < deadline:
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    said: list[str]
    left: dict[int, str]
    """Processes that were still alive a while after it."""


class Command:
    """`orpo-ray train`, or another command on a config, in a session of its own."""

    def __init__(
        self, config: Path, *arguments: str, command: str = "train", environment: dict[str, str] | None = None
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

        return wait_until(asked, what)

    def said(self) -> str:
        """What the command has told the user so far."""
        return self._text("err")

    def send(self, number: signal.Signals, to_group: bool = False) -> None:
        """A signal to the driver, or to the whole group as a terminal or a batch system sends it."""
        (os.killpg if to_group else os.kill)(self.pid, number)

    def end(self, leave_s: float = LEAVE_S) -> Ended:
        """Wait for its end, then for that of all it started."""
        try:
            code = self._process.wait(HANG_S)
            deadline = time.monotonic() + leave_s
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


_FREE_CPUS = f"""
import os, time, ray
ray.init(log_to_driver=False, logging_level="ERROR")
deadline = time.monotonic() + {LEAVE_S}
while (free := ray.available_resources().get("CPU", 0)) < ray.cluster_resources()["CPU"]:
    if time.monotonic() > deadline:
        break
    time.sleep(0.1)
print(free)
"""


class Head:
    """A cluster of one server with a token and ports of its own, and as many CPUs as it is told to have."""

    def __init__(self, cpus: int) -> None:
        # Not pytest's folder: the paths of Ray's sockets may not be longer than 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="orpo-head-"))
        self.processes = Processes()
        token = self._folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="utf-8")
        gcs, client, agent, dashboard = _free_ports(4)
        self.environment = {
            "RAY_ADDRESS": f"127.0.0.1:{gcs}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
            f"--port={gcs}", f"--num-cpus={cpus}", "--num-gpus=0", f"--temp-dir={self._folder}/ray",
            f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-port={dashboard}", f"--object-store-memory={256 * 2**20}", "--disable-usage-stats",
        ]  # fmt: skip
        log = self._folder / "head.log"
        starting = {k: v for k, v in {**ENVIRONMENT, **self.environment}.items() if k != "RAY_ADDRESS"}
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, env={**starting, **self.processes.environment}, stdout=file, stderr=file
            )

        def started() -> bool:
            text = log.read_text(encoding="utf-8", errors="replace")
            assert self._process.poll() is None, text
            return "Ray runtime started" in text

        wait_until(started, "the head's start")

    def free_cpus(self) -> float:
        """CPUs that nobody holds, when all are free or a while has passed."""
        environment = {**ENVIRONMENT, **self.environment}
        command = [sys.executable, "-c", _FREE_CPUS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=HANG_S)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    def end(self) -> None:
        """End its processes, each by its pid, and remove its files."""
        self.processes.end()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _state(folder: Path) -> str:
    """A process's state, its parent and the signals that it is deaf to, to tell why it is still there."""
    wanted = ("State", "PPid", "SigBlk")
    lines = (folder / "status").read_text(encoding="utf-8").splitlines()
    return " ".join("".join(line.split()) for line in lines if line.startswith(wanted))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def worker_pids(run_dir: Path) -> list[int]:
    """Pids of a run's latest workers by rank; none before they are ready."""
    path = run_dir / "run.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return list(content.get("workers", []))


def last_step(run_dir: Path) -> int:
    """The last step that was reported, or -1."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else -1
