"""A file in the storage that one server leaves, so that the others can say whether they see it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from orpo_ray.config.storage import is_url, local_path
from orpo_ray.distributed import marker as markers
from orpo_ray.errors import OrpoRayError
from orpo_ray.storage import Storage, storage_at


def leave_marker(place: str) -> str:
    """Write the file, and return its place; empty if the storage cannot be written.

    Why it cannot is found by the probe of the storage.
    """
    with suppress(OSError, OrpoRayError), _storage(place) as storage:
        return storage.place_of(markers.leave_marker(storage, where(place)))
    return ""


def remove_marker(place: str, marker: str) -> None:
    """Delete the file that `leave_marker` wrote; nothing happens if it wrote none."""
    if marker:
        with suppress(OSError, OrpoRayError), _storage(place) as storage:
            markers.remove_marker(storage, local_path(marker))


def holds(place: str, marker: str) -> bool:
    """Whether this server sees the file in the storage."""
    with _storage(place) as storage:
        return storage.holds(local_path(marker))


def round_trip(place: str, content: bytes) -> bytes:
    """Write a file, read it back from the storage, and delete it."""
    with _storage(place) as storage:
        marker = markers.leave_marker(storage, where(place))
        try:
            return _written_and_read(storage, marker, content)
        finally:
            markers.remove_marker(storage, marker)


def where(place: str) -> Path:
    """The folder of this server in which a file is written: the storage, once it exists.

    Before the first run it may not, and the nearest folder above is taken.
    """
    return local_path(place, "storage") if is_url(place) else nearest(local_path(place, "storage"))


def nearest(path: Path) -> Path:
    """The path itself if it exists, else the nearest folder above."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def _written_and_read(storage: Storage, marker: Path, content: bytes) -> bytes:
    marker.write_bytes(content)
    storage.store(marker)
    if storage.is_remote:
        marker.unlink()
    storage.fetch(marker)
    return marker.read_bytes()


@contextmanager
def _storage(place: str) -> Iterator[Storage]:
    """The storage, with a bucket's local copies in a folder that is deleted, not in the cache."""
    former = os.environ.get("XDG_CACHE_HOME")
    with TemporaryDirectory(prefix="orpo-ray-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield storage_at(place)
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if former is not None:
                os.environ["XDG_CACHE_HOME"] = former
