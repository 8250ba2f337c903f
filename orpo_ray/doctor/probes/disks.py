"""Room and speed of the places where a run writes and reads much."""

import errno
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import IO

from orpo_ray.config.storage import is_url, local_path
from orpo_ray.doctor.facts import Asked, Disk
from orpo_ray.doctor.marker import nearest

STORAGE, HUB_CACHE, RAY = "storage", "hub cache", "Ray's files"
_MOST_BYTES, _MOST_S = 64 * 2**20, 2.0
_BLOCK = 4 * 2**20


def look(asked: Asked) -> tuple[Disk, ...]:
    """The disks of the storage, of the hub's cache and of Ray; each disk is timed once."""
    places = {HUB_CACHE: _hub_cache(), RAY: Path(asked.ray_folder)}
    if asked.storage and not is_url(asked.storage):
        places = {STORAGE: local_path(asked.storage, "storage"), **places}
    timed: set[int] = set()
    found = []
    for what, path in places.items():
        folder = nearest(path)
        found.append(_disk(what, folder, is_timed=folder.stat().st_dev not in timed))
        timed.add(found[-1].device)
    return tuple(found)


def _disk(what: str, folder: Path, *, is_timed: bool) -> Disk:
    device, free = folder.stat().st_dev, shutil.disk_usage(folder).free
    problem, cause, write, read = "", "", None, None
    try:
        # It has no name, so nothing is left if this process is killed.
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            if is_timed and free > 2 * _MOST_BYTES:
                write, read = _speed(file)
    except OSError as error:
        problem, cause = error.strerror or str(error), name_of(error)
    return Disk(
        what=what,
        path=str(folder),
        device=device,
        free_bytes=free,
        write_bytes_per_s=write,
        read_bytes_per_s=read,
        problem=problem,
        error=cause,
    )


def name_of(error: OSError) -> str:
    """The name of a system's error. That root is refused has none: no other owner would help."""
    name = errno.errorcode.get(error.errno or 0, "")
    return "" if name in ("EACCES", "EPERM") and os.geteuid() == 0 else name


def _speed(file: IO[bytes]) -> tuple[float, float]:
    """Bytes a second, written and synchronised, then read again from the disk."""
    block, written = os.urandom(_BLOCK), 0  # some disks compress
    began = time.monotonic()
    while written < _MOST_BYTES and time.monotonic() - began < _MOST_S:
        written += file.write(block)
    os.fsync(file.fileno())
    write_s = time.monotonic() - began
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # or memory would be read
    file.seek(0)
    began, read = time.monotonic(), 0
    while read < written and time.monotonic() - began < _MOST_S:
        read += len(file.read(_BLOCK))
    return written / write_s, read / (time.monotonic() - began)


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
