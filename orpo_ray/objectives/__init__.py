"""The losses: pure functions of the log-probs of pairs.

Each loss has a file here. Its settings have a file of that name in `orpo_ray/config/objectives/`.
"""

import importlib

from orpo_ray.config.objectives import ObjectiveConfig
from orpo_ray.objectives.base import LossParts, NllTokens, Objective, PairLogps, loss_parts
from orpo_ray.objectives.orpo import log_odds, log_odds_ratio


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a config names."""
    built: Objective = importlib.import_module(f"{__name__}.{config.kind}").build(config)
    return built


__all__ = [
    "LossParts",
    "NllTokens",
    "Objective",
    "PairLogps",
    "build_objective",
    "log_odds",
    "log_odds_ratio",
    "loss_parts",
]
