"""The file of the cluster's token.

Everybody who has the token can run any code on the cluster, so only the file's owner may read it.
"""

import os
import secrets
import stat
from pathlib import Path

from orpo_ray.errors import ConfigError

DEFAULT_FILE = "~/.ray/orpo-ray.token"
_BYTES = 32
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def read_token(path: Path) -> str:
    """The token of a file.

    Raises ConfigError if there is none, or if others than the owner may read or write the file.
    """
    try:
        mode, token = path.stat().st_mode, path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        is_missing = isinstance(error, FileNotFoundError)
        hint = "; every client of a cluster needs the cluster's token" if is_missing else ""
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: the token cannot be read: {reason}{hint}") from error
    if mode & _OTHERS:
        raise ConfigError(
            f"{path}: others may read or write the token (mode {mode & 0o777:o}); chmod 600 {path}"
        )
    if not token or len(token.split()) > 1:
        raise ConfigError(f"{path}: must be one line with the token; write it again")
    return token


def make_token(path: Path) -> str:
    """The token of a file. If there is no file, one with a new token is written."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_token(path)
    except OSError as error:
        raise ConfigError(f"{path}: the token cannot be written: {error.strerror}") from error
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(_BYTES) + "\n")
    return read_token(path)
