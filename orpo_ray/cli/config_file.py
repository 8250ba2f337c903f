"""The config that a command names: a file, or the URL of one, such as a search's best.yaml."""

from collections.abc import Sequence
from pathlib import Path

from orpo_ray.config import RunConfig, load_config
from orpo_ray.config.storage import is_url
from orpo_ray.errors import ConfigError
from orpo_ray.storage import fetched


def load(place: str, overrides: Sequence[str]) -> RunConfig:
    """Read a run's YAML and apply `key=value` overrides. Raises ConfigError with one line on any mistake."""
    return load_config(file_of(place), overrides)


def file_of(place: str) -> Path:
    """The config's file on this server. Raises ConfigError where a URL leads to none."""
    if not is_url(place):
        return Path(place)
    file = fetched(place)
    if not file.exists():
        raise ConfigError(f"{place}: no such file")
    return file
