"""Servers on one machine, each of them a network namespace.

Each has its own address, processes, /dev/shm, home and sshd. A bridge joins them with this machine.
All file systems are shared, except each server's home and Ray's temporary folder.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support import wait_until

NETWORK = "10.77.0"
SERVERS, STRANGER = (1, 2, 3), 4
"""Numbers of the cluster's servers, the head first, and of the stranger."""
GATEWAY = f"{NETWORK}.254"
TOOLS = ("ip", "tc", "sshd", "ssh", "ssh-keygen", "rsync", "nft", "unshare", "sshfs", "curl")
_BRIDGE = "orpo-br"
# A limiter of the kernel counts no preamble, checksum and gap: 1514 bytes of each 1538 on the wire.
_COUNTED = 1514 / 1538
_BURST = "256kb"
"""Enough for the largest piece that the kernel sends at once, and for a timer that is late."""
_SSHD = """\
ListenAddress {address}
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile /root/.ssh/authorized_keys
PasswordAuthentication no
StrictModes no
UsePAM no
Subsystem sftp internal-sftp
"""
_BOOT = """\
for kept in {kept}; do
    mkdir -p {folder}/{number}/home/$kept
    mount --bind /root/$kept {folder}/{number}/home/$kept
done
mount --rbind {folder}/{number}/home /root
mount --bind {folder}/{number}/ray /tmp/ray
mount -t tmpfs tmpfs /dev/shm
exec {sshd} -D -e -f {folder}/{number}/sshd_config
"""


def missing() -> list[str]:
    """What the servers need but this machine does not have."""
    lacks = [tool for tool in TOOLS if _which(tool) is None]
    return [*lacks, *([] if os.geteuid() == 0 else ["root"])]


@dataclass
class Lan:
    """The servers, by number from 1; `key` is the private key that all of them accept."""

    folder: Path
    running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    is_ours: bool = False
    """Whether this process made the bridge; another test run may have one of the same name."""

    @property
    def key(self) -> Path:
        """The private key that all servers accept."""
        return self.folder / "key"

    def settings(self, folder: Path) -> dict[str, Any]:
        """What a hosts.yaml says of the cluster."""
        return {
            "name": "trio",
            "head": address(SERVERS[0]),
            "workers": [address(number) for number in SERVERS[1:]],
            "ssh": {"user": "root", "key": str(self.key)},
            "token": str(folder / "token"),
            "environment": sys.prefix,
        }

    def cut(self, number: int, *, off: bool) -> None:
        """Cut a server's network connection, or restore it."""
        _do("ip", "link", "set", _cable(number), "down" if off else "up")

    @contextmanager
    def slow(self, numbers: Sequence[int], mbit: float) -> Iterator[None]:
        """Limit what these servers send, as an Ethernet of that nominal rate does."""
        rate = f"{int(mbit * 1e6 * _COUNTED)}bit"
        limit = ("root", "tbf", "rate", rate, "burst", _BURST, "latency", "100ms")
        for number in numbers:
            _do("tc", "-n", namespace(number), "qdisc", "replace", "dev", "eth0", *limit)
        try:
            yield
        finally:
            for number in numbers:
                _do("tc", "-n", namespace(number), "qdisc", "delete", "dev", "eth0", "root")

    def wait(self, seconds: float) -> None:
        """Let time pass on the servers; nothing else is needed while a connection is cut."""
        assert not self.ssh(STRANGER, f"sleep {seconds}").returncode

    def start(self, servers: int) -> None:
        """Make the bridge and start the servers."""
        for name in ("key", "host_key"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        _do("ip", "link", "add", _BRIDGE, "type", "bridge")
        self.is_ours = True
        _do("ip", "addr", "add", f"{GATEWAY}/24", "dev", _BRIDGE)
        _do("ip", "link", "set", _BRIDGE, "up")
        Path("/run/sshd").mkdir(exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        for number in range(1, servers + 1):
            self._wire(number)
            self.boot(number)

    def boot(self, number: int) -> None:
        """Start a server that is off, and wait until it answers."""
        home = self.folder / str(number) / "home"
        (home / ".ssh").mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.folder / str(number) / "ray").mkdir(exist_ok=True)
        shutil.copy(self.folder / "key.pub", home / ".ssh" / "authorized_keys")
        told = {
            "folder": self.folder,
            "number": number,
            "address": address(number),
            "sshd": _which("sshd"),
            "kept": _kept(),
        }
        (self.folder / str(number) / "sshd_config").write_text(
            _SSHD.format(**told), encoding="utf-8"
        )
        isolated = ("unshare", "--pid", "--fork", "--mount", "--kill-child", "--mount-proc")
        command = [
            "ip",
            "netns",
            "exec",
            namespace(number),
            *isolated,
            "sh",
            "-ec",
            _BOOT.format(**told),
        ]
        with (self.folder / str(number) / "log").open("ab") as log:
            self.running[number] = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        wait_until(
            lambda: not self.ssh(number, "true").returncode, f"server {number} boots", seconds=20
        )

    def kill(self, number: int) -> None:
        """Kill all processes of a server at once, as a power cut does."""
        process = self.running.pop(number)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def ssh(self, number: int, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command on a server."""
        options = (
            "-o",
            "BatchMode=yes",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
        )
        words = ["ssh", "-q", "-i", str(self.key), *options, f"root@{address(number)}", command]
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)

    def stop(self) -> None:
        """End all servers and remove the bridge."""
        for number in list(self.running):
            self.kill(number)
        for folder in self.folder.glob("[0-9]*"):
            _do("ip", "netns", "delete", namespace(int(folder.name)))
        if self.is_ours:
            _do("ip", "link", "delete", _BRIDGE)

    def _wire(self, number: int) -> None:
        (self.folder / str(number)).mkdir()
        inside = namespace(number)
        _do("ip", "netns", "add", inside)
        _do(
            "ip",
            "link",
            "add",
            _cable(number),
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            inside,
        )
        _do("ip", "link", "set", _cable(number), "master", _BRIDGE, "up")
        _do("ip", "-n", inside, "addr", "add", f"{address(number)}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _do("ip", "-n", inside, "link", "set", device, "up")


def address(number: int) -> str:
    """A server's address."""
    return f"{NETWORK}.{number}"


def namespace(number: int) -> str:
    """A server's network namespace."""
    return f"orpo-server-{number}"


def _kept() -> str:
    """The folders of this machine's /root that servers need: Python's, if it is there."""
    python = Path(sys.base_prefix)
    return str(python.relative_to("/root")) if python.is_relative_to("/root") else ""


def _cable(number: int) -> str:
    return f"orpo-{number}"


def _which(tool: str) -> str | None:
    return shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, f"{' '.join(command)}: {done.stderr}"
