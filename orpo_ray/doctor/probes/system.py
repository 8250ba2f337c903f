"""Limits and network of the operating system."""

import os
import resource
from pathlib import Path

from orpo_ray.distributed.servers import own_interfaces
from orpo_ray.doctor.facts import Asked, System

_VARIABLES = (
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "NCCL_P2P_DISABLE",
    "NCCL_IB_DISABLE",
    "NCCL_SHM_DISABLE",
)
_OF_CONTAINERS = (".dockerenv", "run/.containerenv", "var/run/secrets/kubernetes.io")


def look(asked: Asked, root: Path = Path("/")) -> System:
    """The facts of this server, whose files lie below `root`."""
    shared = os.statvfs(root / "dev/shm")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return System(
        shared_memory_bytes=shared.f_frsize * shared.f_blocks,
        open_files=soft,
        open_files_hard=hard,
        in_container=any((root / name).exists() for name in _OF_CONTAINERS),
        interfaces=own_interfaces(),
        has_infiniband=any((root / "sys/class/infiniband").glob("*")),
        variables={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        address=asked.address,
        under_ray=asked.under_ray,
    )
