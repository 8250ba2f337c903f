"""One settings class for each objective, in a file of its name. A new file is a new objective."""

import importlib
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from orpo_ray.config.objectives.base import InTrl, ObjectiveConfig
from orpo_ray.errors import ConfigError

_NO_OBJECTIVE = "base"


def _find() -> dict[str, type[ObjectiveConfig]]:
    found = {}
    for name in sorted(
        module.name for module in pkgutil.iter_modules(__path__) if module.name != _NO_OBJECTIVE
    ):
        settings = _settings_in(importlib.import_module(f"{__name__}.{name}"))
        if [kind.model_fields["kind"].default for kind in settings] != [name]:
            raise ConfigError(
                f"config/objectives/{name}.py: must hold one settings class, whose kind is {name}"
            )
        found[name] = settings[0]
    return found


def _settings_in(module: ModuleType) -> list[type[ObjectiveConfig]]:
    own = [
        item for item in vars(module).values() if getattr(item, "__module__", "") == module.__name__
    ]
    return [item for item in own if isinstance(item, type) and issubclass(item, ObjectiveConfig)]


OBJECTIVES = _find()
"""The settings class of each objective, by its name."""

if TYPE_CHECKING:
    AnyObjective = ObjectiveConfig
else:
    AnyObjective = Annotated[Union[tuple(OBJECTIVES.values())], Field(discriminator="kind")]  # noqa: UP007

__all__ = ["OBJECTIVES", "AnyObjective", "InTrl", "ObjectiveConfig"]
