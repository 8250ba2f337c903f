"""A bucket of an S3-compatible store as a storage, with local copies of the files in use.

The bucket decides what is true: a local copy is never used without asking the bucket.
"""

import configparser
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from orpo_ray.config.storage import SCHEME, WHAT_WORKS, expanded, mirrors
from orpo_ray.errors import ConfigError, OrpoRayError, ResourceError, SetupError, on_one_line

_CONNECT_S, _SILENCE_S = 3, 30
_FIRST_ATTEMPTS, _ATTEMPTS = 2, 8
"""A wrong address is reported within seconds.

After the first answer, the bucket may be silent for a minute.
"""
_BLOCK_BYTES = 8 * 2**20
_BUILDING = ".fetching-"

_ENDPOINT = re.compile(
    r"(https?://)?([\w.-]+|\[[0-9a-f:.]+\])(:\d{1,5})?(/[\w./-]*)?", re.IGNORECASE | re.ASCII
)

_REFUSED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN|MISSING_AUTHENTICATION"
    r"|UNRECOGNIZED_CLIENT|TOKEN_REFRESH|ExpiredToken|HTTP status 40[13]"
)


class Bucket:
    """A bucket with its local copies. `storage.Storage` says what the methods do."""

    is_remote = True

    def __init__(self, name: str, endpoint: str | None) -> None:
        self._name = name
        self._endpoint = endpoint

    def __reduce__(self) -> tuple[type["Bucket"], tuple[str, str | None]]:
        """Travels to workers without its connection: each server has its own credentials."""
        return Bucket, (self._name, self._endpoint)

    @cached_property
    def _files(self) -> Any:
        """The connection, made when it is first needed.

        Raises SetupError if there is no such bucket.
        """
        from pyarrow import fs

        # Other users of this server must not read what is copied from the bucket.
        mirrors().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._explaining():
            found = _connect(self._endpoint, _FIRST_ATTEMPTS).get_file_info(self._name)
        if found.type == fs.FileType.NotFound:
            raise SetupError(
                f"storage: there is no bucket {self._name} at {self._server}; make it, or name "
                "another"
            )
        return _connect(self._endpoint, _ATTEMPTS)

    def check(self) -> None:
        """Write a file and delete it."""
        probe = f"{self._name}/.orpo-ray-{uuid.uuid4().hex[:8]}"
        with self._explaining():
            self._files.open_output_stream(probe).close()
            self._files.delete_file(probe)

    def fetch(self, path: Path) -> bool:
        """Download a file beside its place, then rename it in one step."""
        building = path.with_name(f"{_BUILDING}{uuid.uuid4().hex[:8]}")
        with self._explaining():
            try:
                source = self._files.open_input_stream(self._key(path))
            except FileNotFoundError:
                path.unlink(missing_ok=True)
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with source, building.open("wb") as target:
                    shutil.copyfileobj(source, target, _BLOCK_BYTES)
                building.replace(path)
            finally:
                building.unlink(missing_ok=True)
        return True

    def fetch_folder(self, folder: Path, manifest: str | None = None) -> bool:
        """Fetch the files that are missing or differ, then delete those that the bucket lacks."""
        if manifest is None:
            wanted = self._names(folder)
            for name in wanted:
                self.fetch(_below(folder, name))
        else:
            if not self.fetch_manifest(folder, manifest):
                return False
            entries = _entries(folder / manifest)
            wanted = [manifest, *entries]
            for name, entry in entries.items():
                path = _below(folder, name)
                if not _is_as_listed(path, entry):
                    self.fetch(path)
        if not wanted:
            return False
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            if path.relative_to(folder).as_posix() not in wanted and not path.name.startswith("."):
                path.unlink(missing_ok=True)
        return True

    def fetch_manifest(self, folder: Path, manifest: str) -> bool:
        """Fetch a folder's manifest; if the bucket has none, the local one stays."""
        return self.holds(folder / manifest) and self.fetch(folder / manifest)

    def fetch_folders(self, parent: Path, manifest: str, *, only_manifests: bool = False) -> None:
        """Delete the folders that the bucket does not have, fetch the others."""
        found = (PurePosixPath(name).parts for name in self._names(parent))
        kept = {parts[0] for parts in found if len(parts) == 2 and parts[1] == manifest}
        for listed in parent.glob(f"*/{manifest}"):
            if listed.parent.name not in kept:
                shutil.rmtree(listed.parent, ignore_errors=True)
        for name in sorted(kept):
            if only_manifests:
                self.fetch_manifest(_below(parent, name), manifest)
            else:
                self.fetch_folder(_below(parent, name), manifest)

    def holds(self, path: Path) -> bool:
        """Whether there is an object of that name, or one below it."""
        from pyarrow import fs

        with self._explaining():
            return bool(self._files.get_file_info(self._key(path)).type != fs.FileType.NotFound)

    def store(self, *paths: Path) -> None:
        """Upload files and the files of folders."""
        for path in paths:
            for file in _files_of(path) if path.is_dir() else [path]:
                if file.exists():
                    self._upload(file)

    def store_folder(
        self, folder: Path, manifest: str | None = None, stored: Collection[str] = ()
    ) -> None:
        """Upload a folder in place of an earlier one, but for the files named in `stored`.

        The earlier manifest is deleted first, so that no manifest ever lists files of two folders.
        """
        if manifest is not None:
            self._delete_file(folder / manifest)
        here = [file for file in _files_of(folder) if file != folder / (manifest or "")]
        for file in here:
            if file.name not in stored:
                self._upload(file)
        names = {file.relative_to(folder).as_posix() for file in here}
        for name in self._names(folder):
            if name not in names:
                self._delete_file(folder / name)
        if manifest is not None:
            self._upload(folder / manifest)

    def remove_folder(self, folder: Path, manifest: str) -> None:
        """Delete the manifest, then the rest."""
        self._delete_file(folder / manifest)
        with self._explaining(), suppress(FileNotFoundError):
            self._files.delete_dir(self._key(folder))

    def place_of(self, path: Path) -> str:
        """The URL of a path."""
        return SCHEME + self._key(path)

    def _upload(self, path: Path) -> None:
        with self._explaining(), path.open("rb") as source:
            first = source.read(_BLOCK_BYTES)
            target = self._files.open_output_stream(self._key(path))
            try:
                target.write(first)
                shutil.copyfileobj(source, target, _BLOCK_BYTES)
            except BaseException:
                # pyarrow makes an object of the part that was written, even if the stream is never
                # closed.
                target.close()
                self._files.delete_file(self._key(path))
                raise
            target.close()

    def _delete_file(self, path: Path) -> None:
        with self._explaining(), suppress(FileNotFoundError):
            self._files.delete_file(self._key(path))

    def _names(self, folder: Path) -> list[str]:
        """All files below a folder of the bucket, as relative paths."""
        from pyarrow import fs

        key = self._key(folder)
        selector = fs.FileSelector(key, allow_not_found=True, recursive=True)
        with self._explaining():
            found = self._files.get_file_info(selector)
        return [
            info.path.removeprefix(f"{key}/") for info in found if info.type == fs.FileType.File
        ]

    def _key(self, path: Path) -> str:
        return path.relative_to(mirrors()).as_posix()

    @property
    def _server(self) -> str:
        return self._endpoint or "AWS"

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Turn an error of the network, the server or the local disk into one line of ours."""
        try:
            yield
        except OSError as error:
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> OrpoRayError:
        if error.errno is not None:
            return SetupError(
                f"storage: the copy of {self._name} in {mirrors()}: {error.strerror or error}"
            )
        said = on_one_line(error)
        said = (said.partition("AWS Error ")[2] or said)[:200]
        if _REFUSED.search(said):
            return ConfigError(
                f"storage: {SCHEME}{self._name} at {self._server} refuses these credentials; set "
                "those of the AWS SDK (~/.aws/credentials, AWS_PROFILE, "
                f"AWS_SHARED_CREDENTIALS_FILE): {said}"
            )
        return SetupError(
            f"storage: {SCHEME}{self._name} at {self._server} cannot be used (AWS_ENDPOINT_URL and "
            f"AWS_REGION say where it is): {said}"
        )


def bucket_of(url: str) -> Bucket:
    """The bucket that an s3:// URL names, at the server that the AWS SDK's settings name."""
    return _bucket(url.removeprefix(SCHEME).partition("/")[0], _endpoint())


@cache
def _bucket(name: str, endpoint: str | None) -> Bucket:
    return Bucket(name, endpoint)


def _connect(endpoint: str | None, attempts: int) -> Any:
    """A file system of pyarrow.

    It finds credentials and region as the AWS SDK does, but it must be given the endpoint.
    """
    from pyarrow import fs

    return fs.S3FileSystem(
        endpoint_override=endpoint,
        connect_timeout=_CONNECT_S,
        request_timeout=_SILENCE_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        allow_delayed_open=True,  # one request for a small file, not three
    )


def _endpoint() -> str | None:
    """The server's URL from the AWS SDK's variables or profile; None for AWS itself."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if url := os.environ.get(name):
            return _checked_endpoint(url, name)
    profile = os.environ.get("AWS_PROFILE") or "default"
    file = expanded(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config", "AWS_CONFIG_FILE")
    settings = configparser.RawConfigParser()
    try:
        settings.read(file, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        # The parser's own message quotes the file, which may hold keys.
        raise ConfigError(
            f"{file}: not a file of the AWS SDK; write sections in brackets with name = value lines"
        ) from error
    section = profile if profile == "default" else f"profile {profile}"
    url = settings.get(section, "endpoint_url", fallback=None)
    return None if url is None else _checked_endpoint(url, f"{file}: endpoint_url")


def _checked_endpoint(url: str, setting: str) -> str:
    """The URL, if it names a server and nothing else.

    Every error message shows it, those of the AWS SDK too, so it must hold no password.
    """
    if not _ENDPOINT.fullmatch(url):
        raise ConfigError(
            f"{setting}: must be a server's URL such as http://10.0.0.9:9000, without user, "
            "password or query; credentials are those of the AWS SDK (~/.aws/credentials, "
            "AWS_PROFILE, AWS_SHARED_CREDENTIALS_FILE)"
        )
    return url


def _entries(manifest: Path) -> dict[str, Any]:
    """What a manifest lists; nothing if it is damaged.

    The code that opens the folder reports the damage.
    """
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _is_as_listed(path: Path, entry: Any) -> bool:
    try:
        if path.stat().st_size != entry["size"]:
            return False
        with path.open("rb") as file:
            return bool(hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"])
    except (OSError, KeyError, TypeError):
        return False


def _below(folder: Path, name: str) -> Path:
    """A file of a folder.

    Raises ResourceError for a name that leads out of it: others may write to a bucket.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ResourceError(
            f"storage: {name!r}, listed in {folder.name}, would lie outside of it; {WHAT_WORKS}"
        )
    return folder / path


def _files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
