"""Secrets found where they would be read by others: Ray shows a job's config and environment to all
who ask.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from orpo_ray.config.keys import dotted
from orpo_ray.config.load import parse_override
from orpo_ray.errors import ConfigError

# A word of a variable's name that is one of these, or ends with it, as PGPASSWORD does; TOKENIZERS
# is another word.
_VARIABLES = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?\d*(_|$)", re.IGNORECASE)
_SWITCHES = ("", "0", "1", "true", "false", "yes", "no", "on", "off")
"""Values that are no secret, whatever the variable is called."""
_SIGNED = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|SIGNATURE|CREDENTIAL|^SIG$", re.IGNORECASE)
_NAMES = re.compile(
    r"(?:^|[^A-Za-z])(?:api)?(TOKEN|KEY|SECRET|PASSWORD)(?:$|[^A-Za-z])", re.IGNORECASE
)
_POINTS_TO_A_FILE = re.compile(r"_(FILE|PATH)S?$", re.IGNORECASE)
# What stands before a host: a name with a password, which may have any letters, or a name alone; no
# port before an @.
_USER = re.compile(r"://([^\s/@:\[]*:(?!\d+[/?#,;])[^\s@]*|[^\s/@?#]+)@")
_AFTER_SCHEME = re.compile(r"(?<=://)\S*")
_INSTEAD = "put it into a file that the servers can read, and name the file's path"


def refuse_secrets(
    config: Mapping[str, Any], environment: Mapping[str, str], options: Sequence[str] = ()
) -> None:
    """Raise ConfigError where a setting, variable or option holds what looks like a secret; its
    value is not told.
    """
    for name, value in environment.items():
        names_a_file = _POINTS_TO_A_FILE.search(name) and "/" in value
        if _VARIABLES.search(name) and not names_a_file and value.strip().lower() not in _SWITCHES:
            raise ConfigError(
                f"--env {name}: a secret would be shown to all who may look at the cluster; "
                f"{_INSTEAD}"
            )
        _refuse_url(f"--env {name}", value)
    for key, value in _leaves(config, ""):
        if is_secret(key.rpartition(".")[2]):
            raise ConfigError(
                f"{key}: a secret would be kept with the run and shown by the cluster; {_INSTEAD}"
            )
        _refuse_url(key, value)
    for option in options:
        _refuse_url("an option behind --", option)


def is_secret(setting: str) -> bool:
    """Whether a setting of that name would hold a secret, and not the path of a file with one."""
    words = re.sub(r"([a-z])([A-Z])", r"\1_\2", setting)
    return bool(_NAMES.search(words)) and not _POINTS_TO_A_FILE.search(setting)


def refuse_secrets_in_text(where: str, text: str) -> None:
    """Raise ConfigError for a URL with a secret anywhere in a text that is kept as it was written,
    comments too.
    """
    names = re.findall(r"[?&;]([^\s=&?;]+)=", " ".join(_AFTER_SCHEME.findall(text)))
    if _USER.search(text) or any(_SIGNED.search(unquote(name)) for name in names):
        raise ConfigError(
            f"{where}: the URL carries a secret, which the cluster would show; {_INSTEAD}"
        )


def refuse_secrets_of_overrides(overrides: Sequence[str]) -> None:
    """Raise ConfigError for a secret in overrides that are kept as they were typed, though a later
    one hides it.
    """
    for override in overrides:
        key, value = parse_override(override)
        refuse_secrets({dotted(key): value}, {})
        refuse_secrets_in_text(f"override {dotted(key)}", override)


def _refuse_url(where: str, value: Any) -> None:
    if isinstance(value, str):
        refuse_secrets_in_text(where, value)


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every value under its dotted key."""
    items = (
        tree.items()
        if isinstance(tree, Mapping)
        else enumerate(tree)
        if isinstance(tree, list | tuple)
        else None
    )
    if items is None:
        yield prefix, tree
        return
    for name, value in items:
        yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))
