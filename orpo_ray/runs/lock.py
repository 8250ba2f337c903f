"""Locks that keep a second process away from a run. A lock ends with its process."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RUN_LOCK_FILE = ".lock"
WORKERS_LOCK_FILE = ".workers.lock"
"""Held by the process that writes while workers train.

It may run on another server than the driver.
"""
_POLL_S = 0.2
_held: set[Path] = set()
"""Locks that this process holds."""


class LockedError(Exception):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Hold a lock. Raises LockedError if another process holds it for longer than `patience_s`."""
    with path.open("w") as file:
        if not _lock_within(file.fileno(), patience_s):
            raise LockedError
        _held.add(path.absolute())
        try:
            yield
        finally:
            _held.remove(path.absolute())


@contextmanager
def locked_meanwhile(path: Path) -> Iterator[None]:
    """Hold a lock whose file is gone afterwards.

    Raises LockedError if somebody else holds it, also if that is this process.
    """
    while True:
        with path.open("w") as file:
            if not _lock_within(file.fileno(), 0.0):
                raise LockedError
            if not _is_at(path, file.fileno()):
                continue  # its last holder has removed it since it was opened
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether a path still names the file that was opened there."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock_within(descriptor: int, patience_s: float) -> bool:
    give_up = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= give_up:
                return False
            time.sleep(_POLL_S)
        else:
            return True


def is_locked(path: Path) -> bool:
    """Whether any process holds a lock."""
    if not path.exists():
        return False
    with path.open("r") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def is_ours(path: Path) -> bool:
    """Whether this process holds a lock."""
    return path.absolute() in _held
