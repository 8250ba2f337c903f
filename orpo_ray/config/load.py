"""Reads a YAML file and dotted overrides into a checked RunConfig.

Every error says where the mistake is: key, file and line, or the override.
"""

import json
from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from orpo_ray.config.build import build
from orpo_ray.config.foreign.recognise import project_of
from orpo_ray.config.keys import dotted
from orpo_ray.config.plain_yaml import Key, NotPlainYamlError, parse, shown
from orpo_ray.config.run import RunConfig
from orpo_ray.config.stages import stage_configs
from orpo_ray.config.storage import without_secrets
from orpo_ray.errors import ConfigError

_DEEPEST = 32
_OF_DATA = (".csv", ".tsv", ".jsonl", ".parquet", ".arrow")
_A_CONFIG = "a config is a YAML mapping of sections such as model, data and training"


def load_config(
    source: str | PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = ()
) -> RunConfig:
    """A run's settings from its YAML file, or from plain data of the same shape.

    `overrides` are texts such as `training.seed=7`. Raises ConfigError with one line on any
    mistake.
    """
    overrides = _listed(overrides)
    if isinstance(source, Mapping):
        tree: dict[str, Any] = _copied(source)
        places: dict[Key, str] = {(): "config"}
    elif isinstance(source, str | PathLike):
        _refuse_data(Path(source))
        tree, places = read_yaml(Path(source))
    else:
        raise ConfigError(
            f"config: must be a YAML file's path or a dict of sections, not {type(source).__name__}"
        )
    _refuse_foreign(tree, places[()])
    for override in overrides:
        key, value = parse_override(override)
        place = f"override {shown(without_secrets(override))}"
        if not override.partition("=")[2].strip():
            raise ConfigError(f"{place}: has no value; write it after the =, or null to unset it")
        try:
            set_dotted(tree, key, value)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        places = {k: p for k, p in places.items() if k[: len(key)] != key}
        for n in range(1, len(key) + 1):
            places.setdefault(key[:n], place)
    config = build(RunConfig, tree, places)
    stage_configs(config, places)
    return config


def _refuse_data(file: Path) -> None:
    """Raise ConfigError for a file of pairs in place of a config."""
    if file.suffix.lower() in _OF_DATA:
        raise ConfigError(
            f"{file}: a file of pairs is no config; name it in one, as "
            f"data: {{train: [{{source: {file}}}]}} beside model: {{base: ...}}"
        )


def _refuse_foreign(tree: Mapping[str, Any], file: str) -> None:
    """Raise ConfigError for a config of another project, whose keys are all unknown here."""
    project = project_of(tree)
    if project is None:
        return
    named = "FILE" if file == "config" else file
    raise ConfigError(
        f"{file}: looks like a config of {project}; write ours with: "
        f"orpo-ray config from {named} > run.yaml"
    )


def _listed(overrides: Any) -> list[str]:
    listed = list(overrides) if isinstance(overrides, Iterable) else [overrides]
    if isinstance(overrides, str) or not all(isinstance(override, str) for override in listed):
        kind = type(overrides).__name__
        raise ConfigError(f"overrides: must be a list of texts such as ['name=second'], not {kind}")
    return listed


def _copied(value: Any, depth: int = 0) -> Any:
    """Plain data that overrides may change, with paths as text.

    Raises ConfigError for other data.
    """
    if depth > _DEEPEST:
        raise ConfigError("config: nested too deeply; check that no section holds itself")
    if isinstance(value, Mapping):
        return {key: _copied(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item, depth + 1) for item in value]
    if isinstance(value, PathLike):
        return fspath(value)
    if value is not None and not isinstance(value, str | int | float | bool):
        kind = type(value).__name__
        raise ConfigError(f"config: must be plain data such as numbers and texts; {kind} is not")
    return value


def load_resolved(path: Path) -> RunConfig:
    """Read a `config.json` that a run wrote."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a resolved config: {error}") from error
    return build(RunConfig, tree, {(): str(path)})


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


def parse_override(text: str) -> tuple[Key, Any]:
    """Split `training.learning_rate=3e-4` into its key path and its value, read as YAML."""
    name, equals, value = text.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        quoted = shown(without_secrets(text))
        raise ConfigError(
            f"override {quoted}: write key=value, such as training.learning_rate=3e-4"
        )
    try:
        return tuple(int(part) if part.isdecimal() else part for part in parts), parse(value)[0]
    except NotPlainYamlError as error:
        raise ConfigError(f"override {shown(without_secrets(text))}: {error}") from error


def set_dotted(tree: dict[str, Any], key: Key, value: Any) -> None:
    """Set one value in nested plain data, and make the sections that it needs.

    Raises ConfigError if the key leads through a value or past the end of a list.
    """
    at: Any = tree
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(at, list):
            if not isinstance(part, int) or part >= len(at):
                known = f"0 to {len(at) - 1}" if at else "none; set the whole list"
                raise ConfigError(
                    f"{dotted(key)}: {dotted(key[:depth])} has {len(at)} items, its keys are "
                    f"{known}"
                )
        elif isinstance(at, dict):
            part = str(part)
            if not last and at.get(part) is None:
                at[part] = {}
        else:
            raise ConfigError(f"{dotted(key)}: {dotted(key[:depth])} is a value, not a section")
        if last:
            at[part] = value
        else:
            at = at[part]
