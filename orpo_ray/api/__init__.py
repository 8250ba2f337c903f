"""What the commands do, as Python functions.

Heavy modules are imported in the functions that use them. So a cluster that is too small is refused
before torch is loaded.
"""

from orpo_ray.api.comparing import compare
from orpo_ray.api.exporting import export
from orpo_ray.api.harness import evaluate_by_harness
from orpo_ray.api.judging import judge
from orpo_ray.api.planning import calibrate, estimate, scaling
from orpo_ray.api.trained import chat, evaluate, generate, load
from orpo_ray.api.training import load_config, plan, plan_search, prepare, train, tune

__all__ = [
    "calibrate",
    "chat",
    "compare",
    "estimate",
    "evaluate",
    "evaluate_by_harness",
    "export",
    "generate",
    "judge",
    "load",
    "load_config",
    "plan",
    "plan_search",
    "prepare",
    "scaling",
    "train",
    "tune",
]
