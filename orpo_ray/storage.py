"""Where runs and prepared pairs are kept: a folder, or a bucket that is copied to a folder here as
needed.

All other code reads and writes local paths. Whoever has written what another process or a later
start needs stores it, whoever reads fetches it before. What the bucket has decides: nothing that
lies here is taken for it unseen.
"""

from pathlib import Path
from typing import Protocol

from orpo_ray.bucket import bucket_of
from orpo_ray.config.storage import is_url, local_path, refuse_url
from orpo_ray.errors import ConfigError


class Storage(Protocol):
    """What runs and prepared data need of the place where they are kept.

    Paths are those of this server.
    """

    is_remote: bool
    """Whether files are kept elsewhere than where they are read and written."""

    def check(self) -> None:
        """Raise ResourceError where there is no such storage, ConfigError where it may not be
        written to.
        """

    def fetch(self, path: Path) -> bool:
        """Have a file as the storage has it; False, and none here either, where the storage has
        none.
        """

    def fetch_folder(self, folder: Path, manifest: str | None = None) -> bool:
        """Have a folder as the storage has it; False where the storage has none, and what lies here
        stays.

        With a manifest, which lists `files` by size and SHA-256, only files that differ are
        fetched, and a folder without one is none.
        """

    def fetch_folders(self, parent: Path, manifest: str, *, only_manifests: bool = False) -> None:
        """Have those folders in `parent` that the storage has with a manifest, and no others that
        have one.
        """

    def holds(self, path: Path) -> bool:
        """Whether the storage has a file or folder."""

    def store(self, *paths: Path) -> None:
        """Keep files, and all files of folders, as far as they exist."""

    def store_folder(self, folder: Path, manifest: str | None = None) -> None:
        """Keep a folder and nothing else in its place; its manifest is there once all of it is."""

    def remove_folder(self, folder: Path, manifest: str) -> None:
        """Have the storage forget a folder, its manifest first."""

    def place_of(self, path: Path) -> str:
        """How a path is written for a reader on another server."""


class LocalStorage:
    """A folder: what was written is kept."""

    is_remote = False

    def check(self) -> None:
        """Nothing: whoever writes a file finds out."""

    def fetch(self, path: Path) -> bool:
        """It is here, or nowhere."""
        return path.exists()

    def fetch_folder(self, folder: Path, manifest: str | None = None) -> bool:
        """It is here, or nowhere."""
        return folder.is_dir()

    def fetch_folders(self, parent: Path, manifest: str, *, only_manifests: bool = False) -> None:
        """They are here."""

    def holds(self, path: Path) -> bool:
        """Whether it is here."""
        return path.exists()

    def store(self, *paths: Path) -> None:
        """They are kept where they are."""

    def store_folder(self, folder: Path, manifest: str | None = None) -> None:
        """It is kept where it is."""

    def remove_folder(self, folder: Path, manifest: str) -> None:
        """It was removed."""

    def place_of(self, path: Path) -> str:
        """The path itself."""
        return str(path)


def storage_at(place: str) -> Storage:
    """The storage of a place, written as a path or as an s3:// URL.

    Raises ConfigError for any other URL.
    """
    if not is_url(place):
        return LOCAL
    if problem := refuse_url(place):
        raise ConfigError(problem)
    return bucket_of(place)


def fetched(place: str) -> Path:
    """The path of a file, fetched if it is kept elsewhere; whoever opens it finds out where there
    is none.
    """
    path = local_path(place)
    storage_at(place).fetch(path)
    return path


def file_at(place: str) -> Path:
    """The path of a file that a user names. Raises ConfigError if a URL leads to none."""
    if not is_url(place):
        return Path(place)
    path = fetched(place)
    if not path.exists():
        raise ConfigError(f"{place}: no such file")
    return path


def fetched_folder(place: str, manifest: str | None = None) -> Path:
    """The path of a folder, fetched if it is kept elsewhere; whoever opens it finds out where there
    is none.
    """
    path = local_path(place)
    storage_at(place).fetch_folder(path, manifest)
    return path


LOCAL = LocalStorage()
