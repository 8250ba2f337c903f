"""Commands on a cluster's servers, over SSH."""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orpo_ray.errors import ResourceError

_CONNECT_S = 10
_COMMAND_S = 120
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
        self.known_hosts.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        trust = (f"UserKnownHostsFile={self.known_hosts}", "StrictHostKeyChecking=accept-new")
        options = ("BatchMode=yes", "IdentitiesOnly=yes", *trust)
        told = [part for option in (*options, f"ConnectTimeout={_CONNECT_S}") for part in ("-o", option)]
        words = ["ssh", "-i", str(self.key), *told, f"{self.user}@{address}", command]
        try:
            done = subprocess.run(
                words, input=stdin, capture_output=True, text=True, errors="replace", check=False, timeout=_COMMAND_S
            )
        except FileNotFoundError as error:
            raise ResourceError("ssh is not installed here; the servers are reached with it") from error
        except subprocess.TimeoutExpired as error:
            raise ResourceError(f"{address}: no answer within {_COMMAND_S} s") from error
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            what = f"cannot be reached as {self.user}" if done.returncode == _NOT_REACHED else "a command failed"
            raise ResourceError(f"{address}: {what}: {said}")
        return done.stdout
