"""Reads a YAML file and dotted overrides into a checked RunConfig.

Every error says where the mistake is: key, file and line, or the override.
"""

import json
from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from orpo_ray.config.build import build
from orpo_ray.config.extends import extended, read_config
from orpo_ray.config.keys import EXTENDS, dotted
from orpo_ray.config.plain_yaml import Key, NotPlainYamlError, parse, shown
from orpo_ray.config.run import RunConfig
from orpo_ray.config.stages import stage_configs
from orpo_ray.config.storage import without_secrets
from orpo_ray.errors import ConfigError

_DEEPEST = 32


def load_config(
    source: str | PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = ()
) -> RunConfig:
    """A run's settings from its YAML file, or from plain data of the same shape.

    What either of them extends is read, too. `overrides` are texts such as `training.seed=7`.
    Raises ConfigError with one line on any mistake.
    """
    overrides = _listed(overrides)
    if isinstance(source, Mapping):
        tree, places = extended(_copied(source), {(): "config"}, Path())
    elif isinstance(source, str | PathLike):
        tree, places = read_config(Path(source))
    else:
        raise ConfigError(
            f"config: must be a YAML file's path or a dict of sections, not {type(source).__name__}"
        )
    for override in overrides:
        key, value = parse_override(override)
        place = f"override {shown(without_secrets(override))}"
        if key == (EXTENDS,):
            raise ConfigError(f"{place}: only a file extends another one; write extends into it")
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
