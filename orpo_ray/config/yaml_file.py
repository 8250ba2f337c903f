"""Reads a YAML file, and names it in every complaint."""

from pathlib import Path
from typing import Any

from orpo_ray.config.plain_yaml import Key, NotPlainYamlError, parse
from orpo_ray.errors import ConfigError

_A_CONFIG = "a config is a YAML mapping of sections such as model, data and training"


def read_yaml(path: Path, expected: str = _A_CONFIG) -> tuple[dict[str, Any], dict[Key, str]]:
    """The YAML as plain data, and for each key its `file:line`.

    `expected` is the message for a file that holds no mapping.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder; name a YAML file") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        tree, lines = parse(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8 text: byte 0x{raw[error.start]:02x}"
        ) from error
    except NotPlainYamlError as error:
        raise ConfigError(f"{path}:{error.line or 1}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}:1: {expected}")
    return tree, {(): str(path)} | {key: f"{path}:{line}" for key, line in lines.items()}
