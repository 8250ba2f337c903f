"""Commands on a cluster's servers, over SSH."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orpo_ray.errors import ConfigError, SetupError
from orpo_ray.jobs.hosts import HostsConfig

_CONNECT_S = 10
_COMMAND_S = 120
_NO_SSH = "ssh is not installed here; the servers are reached with it"
_NOT_REACHED = 255
"""The exit code of ssh itself if it cannot connect; other codes are the command's."""
_SPECIAL = re.compile(r'["\\\n]|\$\{')
"""Characters that ssh does not take in a path, even between quotes."""


class Shell(Protocol):
    """Runs commands on servers; tests have one without SSH."""

    def run(self, address: str, command: str, stdin: str = "") -> str:
        """What a command of the server's shell writes to stdout.

        Raises SetupError, naming the server.
        """


@dataclass(frozen=True)
class Ssh:
    """Runs commands with the ssh program of this machine.

    A server's key is trusted when it is first seen. A changed key is refused later.
    """

    user: str
    key: Path
    known_hosts: Path

    def run(self, address: str, command: str, stdin: str = "") -> str:
        """What a command of the server's shell writes to stdout.

        Raises SetupError, naming the server.
        """
        words = [*self._words(), f"{self.user}@{address}", command]
        try:
            done = subprocess.run(
                words,
                input=stdin,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=_COMMAND_S,
            )
        except FileNotFoundError as error:
            raise SetupError(_NO_SSH) from error
        except subprocess.TimeoutExpired as error:
            raise SetupError(f"{address}: no answer within {_COMMAND_S} s") from error
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            what = (
                f"cannot be reached as {self.user}"
                if done.returncode == _NOT_REACHED
                else "a command failed"
            )
            raise SetupError(f"{address}: {what}: {said}")
        return done.stdout

    def forward(self, address: str, port: int, remote_port: int) -> "subprocess.Popen[str]":
        """Forward a port of this machine's loopback to a port of the server's loopback.

        The connection lasts until the process ends, which says on stderr why it ended.
        """
        lead = f"127.0.0.1:{port}:127.0.0.1:{remote_port}"
        alive = (
            "-o",
            "ExitOnForwardFailure=yes",
            "-o",
            "ServerAliveInterval=5",
            "-o",
            "ServerAliveCountMax=3",
        )
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
            raise SetupError(_NO_SSH) from error

    def _words(self) -> list[str]:
        folder = self.known_hosts.parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            why = (
                f"the folder {folder}, which also holds the servers' keys, cannot be made: "
                f"{error.strerror}"
            )
            raise ConfigError(f"token: {why}") from error
        # Without quotes ssh would read a path with a space as two paths.
        known_hosts = str(self.known_hosts).replace("%", "%%")
        trust = (f'UserKnownHostsFile="{known_hosts}"', "StrictHostKeyChecking=accept-new")
        options = ("BatchMode=yes", "IdentitiesOnly=yes", *trust, f"ConnectTimeout={_CONNECT_S}")
        return [
            "ssh",
            "-i",
            str(self.key),
            *(part for option in options for part in ("-o", option)),
        ]


def ssh_to(hosts: HostsConfig) -> Ssh:
    """Ssh to the servers of a hosts.yaml.

    Raises ConfigError if the key cannot be read, or if ssh cannot take a path.
    """
    key, known_hosts = hosts.ssh.key_file, hosts.known_hosts_file
    try:
        key.open("rb").close()
    except OSError as error:
        raise ConfigError(f"ssh.key: {key} cannot be read: {error.strerror}") from error
    if _SPECIAL.search(str(known_hosts)):
        raise ConfigError(
            f'token: {known_hosts.parent}: ssh takes no path with " or \\ or ${{ in it; '
            "choose another"
        )
    return Ssh(hosts.ssh.user, key, known_hosts)
