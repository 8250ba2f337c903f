"""Where files are kept: in a folder, or in a bucket of an S3-compatible store.

A place is written as a path or as an s3:// URL. Each server has a local copy of what it uses of a
bucket. This module only computes names: it opens nothing.
"""

import os
import re
from pathlib import Path

from orpo_ray.errors import ConfigError

SCHEME = "s3://"
WHAT_WORKS = "use s3://bucket/folder, or a folder"
_CREDENTIALS = "credentials and endpoint are those of the AWS SDK: ~/.aws, or AWS_... variables"

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_HALF_A_URL = re.compile(r"s3:|[a-z][a-z0-9+.-]*:/", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]*")


def is_url(place: str) -> bool:
    """Whether a place is written as a URL of any kind."""
    return "://" in place


def refuse_url(url: str) -> str | None:
    """Why a URL names no place in a bucket, or None if it does.

    Quotes nothing that may be a secret.
    """
    scheme, _, rest = url.partition("://")
    if "@" in rest:
        return f"a URL carries no user or password; {_CREDENTIALS}"
    if "?" in rest or "#" in rest:
        return f"a URL carries no query; {_CREDENTIALS}"
    if scheme != "s3":
        return f"{scheme}:// is not supported; {WHAT_WORKS}"
    bucket, *folders = rest.rstrip("/").split("/")
    if not _BUCKET.fullmatch(bucket):
        return f"s3:// needs the name of a bucket (3 to 63 of a-z, 0-9, . and -); {WHAT_WORKS}"
    if not all(_NAME.fullmatch(folder) for folder in folders):
        return "the URL has a folder that is not made of letters, digits and . _ - ="
    return None


def checked_place(place: str) -> str:
    """The place itself, if it is a path or a URL in a bucket.

    Raises ValueError for any other URL, and for a URL that is half written.
    """
    if is_url(place) and (problem := refuse_url(place)):
        raise ValueError(problem)
    if _HALF_A_URL.match(place) and not is_url(place):
        raise ValueError(f"a URL has two slashes after its colon; {WHAT_WORKS}")
    return place


def without_secrets(text: str) -> str:
    """A text for the terminal and the log, without the secrets that a URL in it may hold.

    These stand before the host or after a `?`. A text after the host's colon that is no port number
    is hidden, too: it may be a password whose `@` was forgotten.
    """
    if not is_url(text):
        return text
    text = re.sub(r"://\S*@", "://...@", text)
    text = re.sub(r"://[^\s/'\"\[]*:(?!\d{1,5}(?:[\s/'\"?#]|$))[^\s'\"]*", "://...", text)
    return re.sub(r"\?[^\s'\"]*", "?...", text)


def is_gguf(base: str) -> bool:
    """Whether a base is written as the path of a GGUF file."""
    return base.lower().endswith(".gguf")


def inside(place: str, *names: str) -> str:
    """A place below another one."""
    return "/".join([place.rstrip("/"), *names]) if is_url(place) else str(Path(place, *names))


def local_path(place: str, setting: str = "") -> Path:
    """Where a place is on this server: the path itself, or the local copy of an s3:// URL."""
    return (
        mirrors() / place.removeprefix(SCHEME).rstrip("/")
        if is_url(place)
        else expanded(place, setting)
    )


def expanded(path: str, setting: str = "") -> Path:
    """A path with its ~ expanded as a shell does.

    Raises ConfigError, which names the setting, for the home of an unknown user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        named = f"{setting}: " if setting else ""
        raise ConfigError(
            f"{named}{path}: no user of this server has that name; write the whole path"
        ) from error


def mirrors() -> Path:
    """The folder of this server with the local copies of buckets, one folder a bucket."""
    return caches() / "s3"


def caches() -> Path:
    """The folder of this server with what can be fetched or computed again."""
    folder = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME")
    return (folder / "orpo-ray").resolve()
