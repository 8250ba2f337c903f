"""Where an export goes: a folder that is free, and a folder beside it while it is written."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from orpo_ray.config.storage import expanded, is_url
from orpo_ray.errors import ConfigError, ResourceError, on_one_line
from orpo_ray.runs.lock import LockedError, locked_meanwhile

_REJECTED = ".rejected"
_ROOM = 1.02
"""What a folder takes on disk, as a multiple of its weights."""
_OF_THE_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
)
"""Errors that say that a disk takes nothing more."""


def free_place(to: str) -> Path:
    """The folder to write. Raises ConfigError if it cannot be made."""
    if is_url(to):
        raise ConfigError(f"to: {to} is a URL; export to a folder, and copy that")
    folder = expanded(to, "to").absolute()
    try:
        refuse_taken(folder)
        _lock_of(folder).exists()  # its name is the longest that is made
        if not folder.parent.is_dir():
            raise ConfigError(f"to: no folder {folder.parent}")
    except OSError as error:
        raise ConfigError(f"to: {to}: {error.strerror}") from error
    return folder


def refuse_taken(folder: Path) -> None:
    """Raise ConfigError if something is where the folder would be, accepted or rejected."""
    for taken in (folder, folder.parent / f"{folder.name}{_REJECTED}"):
        if taken.exists() or taken.is_symlink():
            raise ConfigError(f"to: {taken} exists; name another folder, or remove it")


def rejected(folder: Path) -> Path:
    """Where a model lies that does not behave like the one that was trained."""
    return folder.with_name(f"{folder.name}{_REJECTED}")


def _lock_of(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.exporting.lock"


def refuse_full_disk(folder: Path, size: int) -> None:
    """Raise ResourceError if the disk has no room for so many bytes of weights."""
    free = shutil.disk_usage(folder.parent).free
    if size * _ROOM > free:
        raise ResourceError(
            f"to: {folder.parent} has {free / 1e9:.1f} GB free, and {size / 1e9:.1f} GB are written"
        )


@contextmanager
def built(folder: Path) -> Iterator[Path]:
    """A folder to write in, which is gone at the end. Remains of a killed command are removed.

    Raises ConfigError if another command writes the same folder, or has written it meanwhile, and
    ResourceError if the disk takes nothing more.
    """
    building = folder.with_name(f".{folder.name}.exporting")
    try:
        with locked_meanwhile(_lock_of(folder)):
            refuse_taken(folder)
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            try:
                yield building
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except LockedError:
        raise ConfigError(f"to: another process is exporting to {folder}; wait for it") from None
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in _OF_THE_DISK:
            raise
        raise ResourceError(f"{folder}: cannot be written: {on_one_line(error)}") from error
