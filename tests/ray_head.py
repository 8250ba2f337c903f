"""A Ray head to join, and a list of all processes that a command has started."""

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
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from support import ENVIRONMENT, HANG_S, wait_until

_MARK = "ORPO_RAY_TEST_RUN"
_OWN_PORTS = range(20_000, 32_000)
"""Above those of Ray's workers, below those that the system gives to whoever asks for any."""
_NO_ACTORS = ("IDLE", "DashboardAgent", "RuntimeEnvAgent")


@dataclass
class Processes:
    """All processes that a command started, found by a mark that they inherit."""

    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    _held: set[int] = field(default_factory=set)
    _released: set[int] = field(default_factory=set)

    @property
    def environment(self) -> dict[str, str]:
        """The mark, for the environment of the command."""
        return {_MARK: self.mark}

    def left(self) -> dict[int, str]:
        """Pid and command line of the processes that are alive."""
        sought = f"{_MARK}={self.mark}".encode()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if sought in (folder / "environ").read_bytes().split(b"\0"):
                    command = (
                        (folder / "cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                    )
                    found[int(folder.name)] = f"{_state(folder)} {command.strip()[:120]}"
            except OSError:
                continue
        return found

    def actors(self) -> list[str]:
        """Class names of the Ray actors among the processes."""
        titles = re.findall(r" ray::(\w+)", "\n".join(self.left().values()))
        return sorted(title for title in titles if title not in _NO_ACTORS)

    def pid_of_actor(self, title: str) -> int:
        """The one Ray actor of a class."""
        (pid,) = (pid for pid, command in self.left().items() if f" ray::{title}" in command)
        return pid

    def hold(self) -> bool:
        """Hold runs at their next evaluation or checkpoint; returns whether one is held.

        Workers report both through an actor of Ray, which is stopped here. So a signal cannot come
        after the run's end, however slow the machine is.
        """
        meets = " ray::SynchronizationActor"
        found = {pid for pid, title in self.left().items() if meets in title} - self._released
        for pid in found - self._held:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        self._held |= found
        return bool(found)

    def release(self) -> None:
        """Release runs that are held."""
        for pid in self._held:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._released |= self._held
        self._held.clear()

    def end(self) -> None:
        """Kill the processes that are left, each by its pid."""
        deadline = time.monotonic() + HANG_S
        while (left := self.left()) and time.monotonic() < deadline:
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


_FREE_CPUS = f"""
import os, time, ray
ray.init(log_to_driver=False, logging_level="ERROR")
deadline = time.monotonic() + {HANG_S / 2}
while (free := ray.available_resources().get("CPU", 0)) < ray.cluster_resources()["CPU"]:
    if time.monotonic() > deadline:
        break
    time.sleep(0.1)
print(free)
"""


class Head:
    """A cluster of one server with its own token, dashboard and ports, and a number of CPUs."""

    def __init__(self, cpus: int) -> None:
        # Not pytest's folder: the paths of Ray's sockets may not be longer than 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="orpo-head-"))
        self.processes = Processes()
        token = self._folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="utf-8")
        gcs, client, agent, dashboard = free_ports(4)
        self.token, self.dashboard = token, f"http://127.0.0.1:{dashboard}"
        self.environment = {
            "RAY_ADDRESS": f"127.0.0.1:{gcs}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--head",
            "--block",
            "--node-ip-address=127.0.0.1",
            f"--port={gcs}",
            f"--num-cpus={cpus}",
            "--num-gpus=0",
            f"--temp-dir={self._folder}/ray",
            f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-port={dashboard}",
            f"--object-store-memory={256 * 2**20}",
            "--disable-usage-stats",
        ]
        log = self._folder / "head.log"
        starting = {
            k: v for k, v in {**ENVIRONMENT, **self.environment}.items() if k != "RAY_ADDRESS"
        }
        starting["PATH"] = (
            f"{Path(sys.executable).parent}:{starting['PATH']}"  # a job's `python` is found in it
        )
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, env={**starting, **self.processes.environment}, stdout=file, stderr=file
            )

        def started() -> bool:
            text = log.read_text(encoding="utf-8", errors="replace")
            assert self._process.poll() is None, text
            return "Ray runtime started" in text

        wait_until(started, "the head's start")

    @property
    def folder(self) -> Path:
        """The folder of its files, also those of Ray, until it is ended."""
        return self._folder

    def free_cpus(self) -> float:
        """The free CPUs, as soon as all are free or after a while."""
        environment = {**ENVIRONMENT, **self.environment}
        command = [sys.executable, "-c", _FREE_CPUS]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=HANG_S
        )
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    def end(self) -> None:
        """End its processes, each by its pid, and remove its files."""
        self.processes.end()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _state(folder: Path) -> str:
    """A process's state, parent and ignored signals, which may show why it still runs."""
    wanted = ("State", "PPid", "SigBlk")
    lines = (folder / "status").read_text(encoding="utf-8").splitlines()
    return " ".join("".join(line.split()) for line in lines if line.startswith(wanted))


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that are free at the moment.

    Neither the system nor Ray hands them out by itself, so that they stay free.
    """
    ports: set[int] = set()
    while len(ports) < count:
        port = _OWN_PORTS[secrets.randbelow(len(_OWN_PORTS))]
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.add(port)
    return list(ports)
