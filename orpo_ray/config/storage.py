"""Where files are kept: in a folder, or in a bucket of an S3-compatible store with a copy of it on each server.

A place is written as a path or as an s3:// URL. Here is what either means on this server; nothing is opened.
"""

import os
import re
from pathlib import Path

from orpo_ray.errors import ConfigError

SCHEME = "s3://"
WHAT_WORKS = "use s3://bucket/folder, or a folder"
_CREDENTIALS = "credentials and endpoint are those of the AWS SDK: ~/.aws, or AWS_... variables"

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_NAME = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]*")


def is_url(place: str) -> bool:
    """Whether a place is written as a URL of any kind."""
    return "://" in place


def refuse_url(url: str) -> str | None:
    """Why a URL names no place in a bucket, or None if it does. Quotes nothing that may be a secret."""
    scheme, _, rest = url.partition("://")
    if "@" in rest:
        return f"a URL carries no user or password; {_CREDENTIALS}"
    if "?" in rest or "#" in rest:
        return f"a URL carries no query; {_CREDENTIALS}"
    if scheme != "s3":
        return f"{scheme}:// is not supported; {WHAT_WORKS}"
    bucket, *folders = rest.rstrip("/").split("/")
    if not _BUCKET.fullmatch(bucket):
        return f"{bucket!r} is no name of a bucket; {WHAT_WORKS}"
    if not all(_NAME.fullmatch(folder) for folder in folders):
        return f"{url} has a folder that is not made of letters, digits and . _ - ="
    return None


def checked_place(place: str) -> str:
    """A path, or a URL that names a place in a bucket. Raises ValueError for any other URL."""
    if is_url(place) and (problem := refuse_url(place)):
        raise ValueError(problem)
    return place


def without_secrets(text: str) -> str:
    """A text for the terminal and the log, without what a URL in it may carry before its host or after a `?`."""
    return re.sub(r"\?[^\s'\"]*", "?...", re.sub(r"://\S*@", "://...@", text)) if is_url(text) else text


def inside(place: str, *names: str) -> str:
    """A place below another one."""
    return "/".join([place.rstrip("/"), *names]) if is_url(place) else str(Path(place, *names))


def local_path(place: str) -> Path:
    """Where a place is on this server: the path itself, or the copy of what an s3:// URL names."""
    if is_url(place):
        return mirrors() / place.removeprefix(SCHEME).rstrip("/")
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{place}: nobody here has that name, so there is no such home") from error


def mirrors() -> Path:
    """The folder of this server that holds a copy of what it uses of each bucket, under the bucket's name."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(caches).expanduser() / "orpo-ray" / "s3").resolve()
