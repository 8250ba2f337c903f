"""Translates another project's file into a config that loads here."""

from pathlib import Path

from orpo_ray.config.build import build
from orpo_ray.config.foreign import Draft, read_foreign
from orpo_ray.config.foreign.written import tree_of
from orpo_ray.config.run import RunConfig
from orpo_ray.config.yaml_file import read_yaml
from orpo_ray.errors import ConfigError


def translated(path: Path) -> Draft:
    """Translate a file and check the result. Raises ConfigError; its line names the file."""
    foreign, _ = read_yaml(path)
    try:
        draft = read_foreign(foreign, path.stem)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if draft is None:
        raise ConfigError(
            f"{path}: its keys are not those of a TRL, LLaMA-Factory or Axolotl config"
        )
    build(RunConfig, tree_of(draft), {(): str(path)})
    return draft
