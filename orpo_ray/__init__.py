"""orpo_ray: from a base model and preference pairs to an aligned chat model."""

from typing import TYPE_CHECKING, Any

from orpo_ray import lean_imports

if TYPE_CHECKING:
    from orpo_ray.api import evaluate, prepare, train, tune
    from orpo_ray.config import load_config

lean_imports.install()

__all__ = ["evaluate", "load_config", "prepare", "train", "tune"]


def __getattr__(name: str) -> Any:
    """Import torch and Ray only when something that needs them is asked for."""
    if name == "load_config":
        from orpo_ray.config import load_config

        return load_config
    if name in __all__:
        from orpo_ray import api

        return getattr(api, name)
    raise AttributeError(f"module 'orpo_ray' has no attribute {name!r}")
