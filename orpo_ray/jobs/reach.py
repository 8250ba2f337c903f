"""The way to a cluster's dashboard: its URL, or an SSH connection to the head.

The dashboard of a cluster that `orpo-ray cluster up` starts listens on the head's loopback only.
"""

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from orpo_ray.config.storage import expanded
from orpo_ray.errors import ConfigError, SetupError
from orpo_ray.jobs import ports
from orpo_ray.jobs.hosts import HostsConfig, load_hosts
from orpo_ray.jobs.job import UnreachableError
from orpo_ray.jobs.ssh import ssh_to
from orpo_ray.jobs.token import DEFAULT_FILE, read_token

_REFUSED = re.compile(
    r"Permission denied|Host key verification failed|Too many authentication failures"
)
"""What ssh says if the server answers and refuses; another attempt would fail as well."""
LOOPBACK = f"http://127.0.0.1:{ports.DASHBOARD}"


@dataclass(frozen=True)
class Way:
    """How to reach a cluster's dashboard."""

    address: str
    token: str
    through: str = ""
    """The SSH connection, in words; empty if there is none."""
    connect: Callable[[], None] = lambda: None
    """Called before each request; mends a broken connection."""


@contextmanager
def way_to(
    hosts: Path | None, address: str | None, token: Path | None, needs_no_token: bool
) -> Iterator[Way]:
    """The way to the cluster of a hosts.yaml, or to a dashboard's URL.

    If neither is named, it leads to a dashboard on this machine. Nothing is sent before `connect`.
    Raises ConfigError if the token or the key for SSH cannot be read.
    """
    if hosts is None:
        url = address or os.environ.get("RAY_API_SERVER_ADDRESS") or LOOPBACK
        file = token or expanded(
            os.environ.get("RAY_AUTH_TOKEN_PATH") or DEFAULT_FILE, "RAY_AUTH_TOKEN_PATH"
        )
        yield Way(url, "" if needs_no_token and not file.exists() else read_token(file))
        return
    if address is not None:
        raise ConfigError("--hosts and --address both name a cluster; keep one of them")
    cluster = load_hosts(hosts)
    with _Tunnel(cluster) as tunnel:
        through = f"{cluster.head}, over SSH as {cluster.ssh.user}"
        yield Way(tunnel.address, read_token(token or cluster.token_file), through, tunnel.open)


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this machine itself."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Tunnel:
    """Forwards a port of this machine's loopback over SSH to the dashboard on the head."""

    def __init__(self, hosts: HostsConfig) -> None:
        self._hosts, self._ssh = hosts, ssh_to(hosts)
        self._port = _free_port()
        self._process: subprocess.Popen[str] | None = None
        self.address = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> "_Tunnel":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.communicate()

    def open(self) -> None:
        """Connect, unless the connection still works.

        Raises UnreachableError if that fails at the moment, SetupError if the server refuses.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self._process = self._ssh.forward(str(self._hosts.head), self._port, ports.DASHBOARD)
        while not _listens(self._process.pid, self._port):
            try:
                _, said = self._process.communicate(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            why = (said.strip().splitlines() or ["the connection ended"])[-1]
            kind = SetupError if _REFUSED.search(why) else UnreachableError
            raise kind(f"{self._hosts.head}: cannot be reached as {self._hosts.ssh.user}: {why}")


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(pid: int, port: int) -> bool:
    try:
        connections = psutil.Process(pid).net_connections("tcp4")
    except psutil.NoSuchProcess:
        return False
    return any(
        each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in connections
    )
