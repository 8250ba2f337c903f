"""Commands on a cluster's servers, over SSH."""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orpo_ray.errors import ResourceError

_CONNECT_S = 10
_COMMAND_S = 120
_NO_SSH = "ssh is not installed here; the servers are reached with it"
_NOT_REACHED = 255
"""What ssh itself returns where there is no connection, beside the exit codes of commands."""


class Shell(Protocol):
    """What starts and stops a cluster needs of its servers."""

    def run(self, address: str, command: str, stdin: str = "") -> str:
        """What a command of the server's shell writes to stdout. Raises ResourceError, naming the server."""


@dataclass(frozen=True)
class Ssh:
    """The servers as they are. A server that is met for the first time is trusted; another key later is refused."""

    user: str
    key: Path
    known_hosts: Path

    def run(self, address: str, command: str, stdin: str = "") -> str:
        """What a command of the server's shell writes to stdout. Raises ResourceError, naming the server."""
        words = [*self._words(), f"{self.user}@{address}", command]
        try:
            done = subprocess.run(
                words, input=stdin, capture_output=True, text=True, errors="replace", check=False, timeout=_COMMAND_S
            )
        except FileNotFoundError as error:
            raise ResourceError(_NO_SSH) from error
        except subprocess.TimeoutExpired as error:
            raise ResourceError(f"{address}: no answer within {_COMMAND_S} s") from error
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            what = f"cannot be reached as {self.user}" if done.returncode == _NOT_REACHED else "a command failed"
            raise ResourceError(f"{address}: {what}: {said}")
        return done.stdout

    def forward(self, address: str, port: int, remote_port: int) -> "subprocess.Popen[str]":
        """Lead a port of this machine's loopback to one of the server's, until the process ends; it tells why."""
        lead = f"127.0.0.1:{port}:127.0.0.1:{remote_port}"
        alive = ("-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
        words = [*self._words(), *alive, "-N", "-L", lead, f"{self.user}@{address}"]
        try:
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except FileNotFoundError as error:
            raise ResourceError(_NO_SSH) from error

    def _words(self) -> list[str]:
        self.known_hosts.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        trust = (f"UserKnownHostsFile={self.known_hosts}", "StrictHostKeyChecking=accept-new")
        options = ("BatchMode=yes", "IdentitiesOnly=yes", *trust, f"ConnectTimeout={_CONNECT_S}")
        return ["ssh", "-i", str(self.key), *(part for option in options for part in ("-o", option))]
