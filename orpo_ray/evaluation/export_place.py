"""Where an export goes: a folder that is free, and a folder beside it while it is written."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from orpo_ray.config.storage import expanded, is_url
from orpo_ray.errors import ConfigError, ResourceError, on_one_line
from orpo_ray.runs.lock import LockedError, locked

_LOCK = ".lock"
_ROOM = 1.02
"""What a folder takes on disk, as a multiple of its weights."""


def free_place(to: str) -> Path:
    """The folder to write. Raises ConfigError if it cannot be made."""
    if is_url(to):
        raise ConfigError(f"to: {to} is a URL; export to a folder, and copy that")
    folder = expanded(to, "to").absolute()
    for taken in (folder, rejected(folder)):
        if taken.exists() or taken.is_symlink():
            raise ConfigError(f"to: {taken} exists; name another folder, or remove it")
    if not folder.parent.is_dir():
        raise ConfigError(f"to: no folder {folder.parent}")
    return folder


def rejected(folder: Path) -> Path:
    """Where a model lies that does not behave like the one that was trained."""
    return folder.with_name(f"{folder.name}.rejected")


def refuse_full_disk(folder: Path, size: int) -> None:
    """Raise ResourceError if the disk has no room for so many bytes of weights."""
    free = shutil.disk_usage(folder.parent).free
    if size * _ROOM > free:
        raise ResourceError(
            f"to: {folder.parent} has {free / 1e9:.1f} GB free, and {size / 1e9:.1f} GB are written"
        )


@contextmanager
def built(folder: Path) -> Iterator[Path]:
    """A folder to write in, which is gone at the end. Remains of a killed command are removed."""
    building = folder.with_name(f".{folder.name}.exporting")
    try:
        building.mkdir(exist_ok=True)
        with locked(building / _LOCK):
            for left in building.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
            try:
                yield building
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except LockedError:
        raise ConfigError(f"to: another process is exporting to {folder}; wait for it") from None
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"{folder}: cannot be written: {on_one_line(error)}") from error
    except MemoryError as error:
        raise ResourceError("no room in memory for a shard of the weights") from error
