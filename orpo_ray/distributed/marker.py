"""A file in the storage by which servers find out that they share it."""

import shutil
import uuid
from pathlib import Path

from orpo_ray.storage import Storage

_NAME = "marker"


def leave_marker(storage: Storage, root: Path) -> Path:
    """Keep a file in a folder of its own below `root`, and return its path on this server.

    Raises OSError if the folder cannot be written.
    """
    marker = root / f"_seen-{uuid.uuid4().hex}" / _NAME
    marker.parent.mkdir(parents=True)
    marker.write_text(_NAME, encoding="utf-8")
    storage.store(marker)
    return marker


def remove_marker(storage: Storage, marker: Path) -> None:
    """Delete the file and its folder, here and in the storage."""
    storage.remove_folder(marker.parent, marker.name)
    shutil.rmtree(marker.parent, ignore_errors=True)
