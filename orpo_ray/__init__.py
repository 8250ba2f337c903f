"""orpo_ray: from a base model and preference pairs to an aligned chat model.

    config = orpo_ray.load_config("run.yaml", ["objective.lambda=0.3"])
    result = orpo_ray.train(config)
    print(result.adapter, result.metrics["eval/accuracy"])

`estimate`, `prepare`, `train`, `tune`, `compare`, `evaluate`, `generate`, `export`, `plan` and
`plan_search` take a config and return a frozen result; `judge` takes two files of answers. What a
user can mend is raised as an OrpoRayError. docs/python.md and docs/after-training.md have examples.
"""

import importlib
from typing import TYPE_CHECKING, Any

from orpo_ray import lean_imports as _lean_imports

if TYPE_CHECKING:
    from orpo_ray.api import (
        compare,
        estimate,
        evaluate,
        export,
        generate,
        judge,
        load,
        load_config,
        plan,
        plan_search,
        prepare,
        train,
        tune,
    )
    from orpo_ray.api.planning import Estimate
    from orpo_ray.config import RunConfig
    from orpo_ray.data.store import Artifact
    from orpo_ray.errors import (
        CannotTellError,
        ConfigError,
        DataError,
        NonFiniteError,
        OrpoRayError,
        ResourceError,
        RunError,
        SetupError,
        StoppedError,
        UserError,
    )
    from orpo_ray.runs.comparison import Comparison
    from orpo_ray.runs.console import Console
    from orpo_ray.runs.results import (
        Evaluation,
        Exported,
        Generated,
        Likeness,
        Sample,
        SearchPlan,
        TrainPlan,
        TrainResult,
        WinRate,
    )
    from orpo_ray.runs.search import SearchResult

    __version__: str

_lean_imports.install()

__all__ = [
    "Artifact",
    "CannotTellError",
    "Comparison",
    "ConfigError",
    "Console",
    "DataError",
    "Estimate",
    "Evaluation",
    "Exported",
    "Generated",
    "Likeness",
    "NonFiniteError",
    "OrpoRayError",
    "ResourceError",
    "RunConfig",
    "RunError",
    "Sample",
    "SearchPlan",
    "SearchResult",
    "SetupError",
    "StoppedError",
    "TrainPlan",
    "TrainResult",
    "UserError",
    "WinRate",
    "__version__",
    "compare",
    "estimate",
    "evaluate",
    "export",
    "generate",
    "judge",
    "load",
    "load_config",
    "plan",
    "plan_search",
    "prepare",
    "train",
    "tune",
]

# The modules of public names that `api` does not define. Most are imported only when they are used.
_HOMES = {
    "api.planning": ("Estimate",),
    "config": ("RunConfig",),
    "data.store": ("Artifact",),
    "errors": (
        "CannotTellError",
        "ConfigError",
        "DataError",
        "NonFiniteError",
        "OrpoRayError",
        "ResourceError",
        "RunError",
        "SetupError",
        "StoppedError",
        "UserError",
    ),
    "runs.comparison": ("Comparison",),
    "runs.console": ("Console",),
    "runs.results": (
        "Evaluation",
        "Exported",
        "Generated",
        "Likeness",
        "Sample",
        "SearchPlan",
        "TrainPlan",
        "TrainResult",
        "WinRate",
    ),
    "runs.search": ("SearchResult",),
}


def __getattr__(name: str) -> Any:
    """Import torch and Ray only when something that needs them is called."""
    if name == "__version__":
        from importlib.metadata import version

        return version("orpo-ray")
    if name not in __all__:
        raise AttributeError(f"module 'orpo_ray' has no attribute {name!r}")
    home = next((room for room, names in _HOMES.items() if name in names), "api")
    return getattr(importlib.import_module(f"orpo_ray.{home}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
