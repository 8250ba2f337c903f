"""Shared memory and open files."""

from collections.abc import Iterator

from orpo_ray.doctor.facts import Asked, System
from orpo_ray.doctor.findings import Finding, ok, warning

MEMORY, FILES = "/dev/shm", "open files"

_OBJECT_STORE_BYTES = 2 * 2**30
"""What a Ray that a run starts takes at most (ray_runtime.py); with less it goes to the disk."""
_FILES = 8192
"""What Ray recommends (ray 2.60, worker.py: it warns below 4096)."""


def judge_memory(asked: Asked, found: System) -> Iterator[Finding]:
    """Whether Ray's object store and NCCL have room in shared memory."""
    size = found.shared_memory_bytes
    if size >= _OBJECT_STORE_BYTES:
        yield ok(MEMORY, f"{size / 2**30:.1f} GB")
        return
    fix = (
        "start the container with --shm-size=8g (Kubernetes: an emptyDir of medium Memory)"
        if found.in_container
        else "mount -o remount,size=8G /dev/shm"
    )
    yield warning(
        MEMORY,
        f"{size / 2**20:.0f} MB; Ray keeps its objects on disk with less than 2 GB, and NCCL may "
        "find no room between GPUs",
        fix,
    )


def judge_files(asked: Asked, found: System) -> Iterator[Finding]:
    """Whether Ray may open enough files and connections.

    A driver raises the limit as far as it may. Processes of a running Ray have that of `ray start`.
    """
    limit = found.open_files if found.under_ray else max(found.open_files, found.open_files_hard)
    if limit >= _FILES or limit < 0:
        yield ok(FILES, "no limit" if limit < 0 else str(limit))
        return
    raised = found.open_files_hard >= _FILES or found.open_files_hard < 0
    fix = f"ulimit -n {_FILES} before ray start, or orpo-ray cluster up, which does that"
    if not raised:
        fix = (
            f"start the container with --ulimit nofile={_FILES}:{_FILES}"
            if found.in_container
            else f"add '* - nofile {_FILES}' to /etc/security/limits.conf, and log in again"
        )
    yield warning(
        FILES, f"at most {limit}; Ray wants {_FILES}, or connections fail on a larger run", fix
    )
