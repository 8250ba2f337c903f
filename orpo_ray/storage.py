"""Where runs and prepared pairs are kept: a folder, or a bucket with copies in a folder here.

All other code reads and writes local paths. Code that writes a file for another process or for a
later start calls `store` afterwards. Code that reads such a file calls `fetch` before. The bucket
decides what is true: a local copy is never used without asking the bucket.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from orpo_ray.bucket import bucket_of
from orpo_ray.config.storage import is_url, local_path, refuse_url
from orpo_ray.errors import ConfigError


class Storage(Protocol):
    """What runs and prepared data need from the place where they are kept.

    Paths are those of this server. After a fetch, a local file or folder is as in the storage.
    """

    is_remote: bool
    """Whether files are kept in another place than where they are read and written."""

    def check(self) -> None:
        """Raise ResourceError if there is no such storage, ConfigError if writing is refused."""

    def fetch(self, path: Path) -> bool:
        """Fetch a file.

        If the storage has none, deletes the local one and returns False.
        """

    def fetch_folder(self, folder: Path, manifest: str | None = None) -> bool:
        """Fetch a folder.

        If the storage has none, keeps the local one and returns False. A manifest lists `files` by
        size and SHA-256: with it only files that differ are fetched, and a folder of the storage
        that has no manifest does not count.
        """

    def fetch_folders(self, parent: Path, manifest: str, *, only_manifests: bool = False) -> None:
        """Fetch all folders in `parent` that have a manifest in the storage.

        Deletes the local folders that have a manifest here and none in the storage.
        """

    def holds(self, path: Path) -> bool:
        """Whether the storage has a file or folder."""

    def store(self, *paths: Path) -> None:
        """Keep files, and all files of folders, if they exist."""

    def store_folder(
        self, folder: Path, manifest: str | None = None, stored: Collection[str] = ()
    ) -> None:
        """Keep a folder and nothing else in its place; its manifest is stored last.

        The files named in `stored` are there already.
        """

    def remove_folder(self, folder: Path, manifest: str) -> None:
        """Delete a folder from the storage, its manifest first."""

    def place_of(self, path: Path) -> str:
        """How a path is written for a reader on another server."""


class LocalStorage:
    """A folder: what is written there is kept there, so nothing needs to be copied."""

    is_remote = False

    def check(self) -> None:
        """Does nothing: the first write reports a folder that cannot be written."""

    def fetch(self, path: Path) -> bool:
        """Whether the file is here."""
        return path.exists()

    def fetch_folder(self, folder: Path, manifest: str | None = None) -> bool:
        """Whether the folder is here."""
        return folder.is_dir()

    def fetch_folders(self, parent: Path, manifest: str, *, only_manifests: bool = False) -> None:
        """Does nothing: the folders are here."""

    def holds(self, path: Path) -> bool:
        """Whether the file or folder is here."""
        return path.exists()

    def store(self, *paths: Path) -> None:
        """Does nothing: the files are kept where they are."""

    def store_folder(
        self, folder: Path, manifest: str | None = None, stored: Collection[str] = ()
    ) -> None:
        """Does nothing: the folder is kept where it is."""

    def remove_folder(self, folder: Path, manifest: str) -> None:
        """Does nothing: the caller has removed the folder."""

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
    """The local path of a file, fetched if it is kept elsewhere.

    It may not exist; opening it reports that.
    """
    path = local_path(place)
    storage_at(place).fetch(path)
    return path


def file_at(place: str) -> Path:
    """The local path of a file that a user names.

    Raises ConfigError if it is a URL without a file.
    """
    if not is_url(place):
        return Path(place)
    path = fetched(place)
    if not path.exists():
        raise ConfigError(f"{place}: no such file")
    return path


def fetched_folder(place: str, manifest: str | None = None) -> Path:
    """The local path of a folder, fetched if it is kept elsewhere.

    It may not exist; opening it reports that.
    """
    path = local_path(place)
    storage_at(place).fetch_folder(path, manifest)
    return path


LOCAL = LocalStorage()
