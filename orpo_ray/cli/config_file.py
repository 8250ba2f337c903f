"""The config that a command names: a file, or the URL of one, such as a search's best.yaml."""

from collections.abc import Sequence

from orpo_ray.config import RunConfig, load_config
from orpo_ray.storage import file_at


def load(place: str, overrides: Sequence[str]) -> RunConfig:
    """Read a run's YAML and apply `key=value` overrides.

    Raises ConfigError with one line on any mistake.
    """
    return load_config(file_at(place), overrides)
