"""From plain data to a checked config, and back."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from orpo_ray.config.explain import explain
from orpo_ray.config.plain_yaml import Key
from orpo_ray.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def build(model: type[Model], tree: Mapping[str, Any], places: Mapping[Key, str]) -> Model:
    """Validate plain data. Raises ConfigError with the first mistake and its place, in one line."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(model, error, places, tree)) from None


def dump(config: BaseModel) -> dict[str, Any]:
    """The config as plain data, under the names that the YAML uses."""
    return config.model_dump(mode="json", by_alias=True)
