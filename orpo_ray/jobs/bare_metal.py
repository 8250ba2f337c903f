"""Starts, inspects and stops a Ray cluster on the user's own servers, with Ray's launcher."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orpo_ray.errors import ConfigError, ResourceError, SetupError, on_one_line
from orpo_ray.jobs import ports
from orpo_ray.jobs.hosts import HostsConfig
from orpo_ray.jobs.render import TOKEN_FILE, bare_metal
from orpo_ray.jobs.ssh import Shell
from orpo_ray.jobs.token import make_token, read_token

# Ray's second autoscaler counts the head as a worker and leaves the last server out (Ray 2.60).
_FIRST_AUTOSCALER = {"RAY_UP_enable_autoscaler_v2": "0"}

_JOIN_S, _POLL_S = 120.0, 2.0
_LAUNCH_S = 600

_VERSIONS = (
    "import importlib.metadata as m, platform; "
    "print(platform.python_version(), *(p + ' ' + m.version(p) for p in ('ray', 'torch', "
    "'orpo-ray')), sep=', ')"
)
_NODES = (
    "import json, logging, ray; "
    "ray.init(address='{head}', logging_level=logging.ERROR, log_to_driver=False); "
    "print(json.dumps([[n['NodeManagerAddress'], n['Resources'].get('CPU', 0), "
    "n['Resources'].get('GPU', 0)] "
    "for n in ray.nodes() if n['Alive']]))"
)


@dataclass(frozen=True)
class Server:
    """A server of the cluster and what it adds; both numbers are 0 until it has joined."""

    address: str
    joined: bool
    cpus: float = 0.0
    gpus: float = 0.0


class Launcher(Protocol):
    """Starts Ray on all servers, from the launcher's YAML.

    Raises SetupError if it cannot.
    """

    def __call__(self, text: str, *, keep_head: bool) -> None:
        """Start the head, unless it is to stay as it is; the head starts the others."""


def up(
    hosts: HostsConfig, shell: Shell, launch: Launcher, announce: Callable[[str], None]
) -> list[Server]:
    """Give every server the token, start Ray on all of them, and wait until each has joined.

    If the head is up, it and its jobs are left alone. Only the missing servers are started then.
    Raises SetupError for a server that cannot be reached or does not join. Raises ConfigError
    if the servers do not have the same versions.
    """
    found = status(hosts, shell, lambda why: None)
    if all(server.joined for server in found):
        announce(f"cluster {hosts.name} is up already")
        return found
    _refuse_other_versions(_versions(hosts, shell))
    token = make_token(hosts.token_file)
    for address in hosts.addresses:
        shell.run(address, _KEEP_TOKEN, stdin=f"{token}\n")
    missing = ", ".join(server.address for server in found if not server.joined)
    announce(
        f"{len(hosts.addresses)} servers have the token of {hosts.token_file}; starting Ray on "
        f"{missing}"
    )
    launch(bare_metal(hosts)[f"{hosts.name}.launcher.yaml"], keep_head=found[0].joined)
    return _wait_until_joined(hosts, shell)


def plan(hosts: HostsConfig) -> dict[str, list[str]]:
    """What `up` would do on each server; connects to none of them.

    Raises ConfigError for a token that cannot be used.
    """
    is_new = not hosts.token_file.exists()
    if not is_new:
        read_token(hosts.token_file)
    steps = [
        f"as {hosts.ssh.user} over SSH, compare its versions with the head's",
        f"give it {'a new token, made in' if is_new else 'the token of'} {hosts.token_file}",
    ]
    start = f"start Ray of {hosts.environment}"
    head, *workers = hosts.addresses
    return {head: [*steps, f"{start} as the head"]} | {
        worker: [*steps, f"{start} and have it join {head}"] for worker in workers
    }


def status(hosts: HostsConfig, shell: Shell, announce: Callable[[str], None]) -> list[Server]:
    """Which servers have joined the cluster.

    If the head does not answer, none has joined, and the reason is announced.
    """
    command = (
        f"{_AUTHENTICATED}{hosts.environment}/bin/python -c "
        f'"{_NODES.format(head=f"{hosts.head}:{ports.GCS}")}"'
    )
    try:
        joined = {
            address: (cpus, gpus)
            for address, cpus, gpus in json.loads(_last_line(shell, hosts, command))
        }
    except ConfigError:
        raise
    except (ResourceError, ValueError) as error:
        announce(f"no cluster answers on the head: {on_one_line(error)}")
        joined = {}
    return [
        Server(address, True, *joined[address])
        if address in joined
        else Server(address, joined=False)
        for address in hosts.addresses
    ]


def down(hosts: HostsConfig, shell: Shell, announce: Callable[[str], None]) -> list[str]:
    """Stop Ray on every server, and return the servers that could not be reached.

    The head comes first, since it would start the others again.
    """
    missed = []
    for address in hosts.addresses:
        try:
            shell.run(address, f"{hosts.environment}/bin/ray stop")
        except ResourceError as error:
            announce(str(error))
            missed.append(address)
    return missed


_AUTHENTICATED = f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={TOKEN_FILE}; "
_KEEP_TOKEN = (
    f'umask 077; file="{TOKEN_FILE}"; mkdir -p "$(dirname "$file")"; cat > "$file.new" '
    '&& mv "$file.new" "$file"'
)


def _last_line(shell: Shell, hosts: HostsConfig, command: str) -> str:
    return (shell.run(str(hosts.head), command).strip().splitlines() or [""])[-1]


def _versions(hosts: HostsConfig, shell: Shell) -> dict[str, str]:
    command = f'{hosts.environment}/bin/python -c "{_VERSIONS}"'
    return {address: shell.run(address, command).strip() for address in hosts.addresses}


def _refuse_other_versions(versions: dict[str, str]) -> None:
    """Raise ConfigError if a server has other versions than the head."""
    (head, expected), *others = versions.items()
    for address, found in others:
        if found != expected:
            raise ConfigError(
                f"{address} has {found}, but the head {head} has {expected}; "
                "install the same on both"
            )


def _wait_until_joined(hosts: HostsConfig, shell: Shell) -> list[Server]:
    deadline = time.monotonic() + _JOIN_S
    while True:
        found = status(hosts, shell, lambda why: None)
        missing = [server.address for server in found if not server.joined]
        if not missing:
            return found
        if time.monotonic() > deadline:
            raise SetupError(
                f"{', '.join(missing)} did not join within {_JOIN_S:.0f} s; the reason is in "
                "/tmp/ray/session_latest/logs/monitor.log on the head"
            )
        time.sleep(_POLL_S)


@dataclass(frozen=True)
class RayLauncher:
    """Ray's own cluster launcher, which reaches the servers over SSH."""

    log: Path

    def __call__(self, text: str, *, keep_head: bool) -> None:
        """Start the head, unless it is to stay as it is; the head starts the others."""
        with tempfile.TemporaryDirectory(prefix="orpo-ray-") as folder:
            config = Path(folder) / "launcher.yaml"
            config.write_text(text, encoding="utf-8")
            keep = ["--no-restart"] if keep_head else []
            self._run(
                ["up", "--yes", "--no-config-cache", "--disable-usage-stats", *keep, str(config)]
            )

    def _run(self, arguments: Sequence[str]) -> None:
        command = [str(Path(sys.executable).with_name("ray")), *arguments]
        with self.log.open("a", encoding="utf-8") as log:
            try:
                code = subprocess.run(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **_FIRST_AUTOSCALER},
                    check=False,
                    timeout=_LAUNCH_S,
                ).returncode
            except subprocess.TimeoutExpired as error:
                raise SetupError(
                    f"Ray's launcher did not end within {_LAUNCH_S} s (its log: {self.log})"
                ) from error
        if code:
            raise SetupError(f"Ray's launcher ended with exit code {code} (its log: {self.log})")
