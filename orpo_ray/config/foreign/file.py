"""A file of another project as one of ours that loads."""

from pathlib import Path

from orpo_ray.config.build import build
from orpo_ray.config.foreign import Draft, read_foreign
from orpo_ray.config.foreign.written import tree_of
from orpo_ray.config.load import read_yaml
from orpo_ray.config.run import RunConfig
from orpo_ray.errors import ConfigError


def translated(path: Path) -> Draft:
    """Read a file and check what it comes to. Raises ConfigError, one line that names the file."""
    foreign, _ = read_yaml(path)
    try:
        draft = read_foreign(foreign, path.stem)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if draft is None:
        raise ConfigError(f"{path}: by its keys no config of TRL, LLaMA-Factory or Axolotl")
    build(RunConfig, tree_of(draft), {(): str(path)})
    return draft
