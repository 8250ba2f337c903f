"""Fills in the files of `cluster/`."""

import json
from pathlib import Path
from string import Template

from orpo_ray.jobs import ports
from orpo_ray.jobs.hosts import HostsConfig

TOKEN_FILE = "$HOME/.ray/orpo-ray.token"
"""The cluster's token on every server, in the home of the user who starts Ray."""


def cluster_file(name: str) -> str:
    """The text of a file of `cluster/`.

    The folder lies inside the installed package. In a checkout it lies beside the package.
    """
    package = Path(__file__).parents[1]
    home = next(
        folder for folder in (package / "cluster", package.parent / "cluster") if folder.is_dir()
    )
    return (home / name).read_text(encoding="utf-8")


def bare_metal(hosts: HostsConfig) -> dict[str, str]:
    """The files for the user's own servers, by name: the launcher's YAML and the firewall."""
    return {
        f"{hosts.name}.launcher.yaml": fill("bare-metal/launcher.yaml", _launcher(hosts)),
        f"{hosts.name}.firewall.nft": fill("bare-metal/firewall.nft", _firewall(hosts)),
    }


def fill(name: str, values: dict[str, str]) -> str:
    """A file of `cluster/` with its `$names` replaced."""
    return Template(cluster_file(name)).substitute(values)


def _launcher(hosts: HostsConfig) -> dict[str, str]:
    return {
        "name": json.dumps(hosts.name),
        "head": str(hosts.head),
        "workers": json.dumps([str(address) for address in hosts.workers]),
        "worker_count": str(len(hosts.workers)),
        "user": json.dumps(hosts.ssh.user),
        "key": json.dumps(hosts.ssh.key),
        "environment": hosts.environment,
        "gcs": str(ports.GCS),
        "client": str(ports.CLIENT),
        "dashboard": str(ports.DASHBOARD),
        "which_address": _which_address(hosts),
        "settings": _SETTINGS,
        "node_ports": node_ports(),
    }


def _which_address(hosts: HostsConfig) -> str:
    """Shell code that finds which of the cluster's addresses is the server's, and its interface."""
    ours = " ".join(f"-e {address}" for address in hosts.addresses)
    return (
        f"address=$(ip -o -4 addr show | awk '{{print $4}}' | cut -d/ -f1 | grep -Fx {ours} "
        "| head -n 1); "
        """interface=$(ip -o -4 addr show to "$address" | awk '{print $2}' | head -n 1);"""
    )


# On a server with several interfaces, gloo and NCCL would each guess which one to use.
_SETTINGS = (
    f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={TOKEN_FILE} "
    'GLOO_SOCKET_IFNAME="$interface" NCCL_SOCKET_IFNAME="$interface";'
)


def node_ports() -> str:
    """The options of `ray start` that set every port of a server."""
    single = " ".join(f"--{option}={port}" for option, port in ports.OF_EACH_SERVER.items())
    return f"{single} --min-worker-port={ports.WORKERS[0]} --max-worker-port={ports.WORKERS[1]}"


def _firewall(hosts: HostsConfig) -> dict[str, str]:
    return {
        "peers": ", ".join(hosts.addresses),
        "ports": ", ".join(ports.shut_to_strangers()),
        "ephemeral": f"{ports.EPHEMERAL[0]}-{ports.EPHEMERAL[1]}",
    }
