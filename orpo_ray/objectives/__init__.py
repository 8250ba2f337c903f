"""The losses: pure functions of pair log-probs, one small file each, and the registry that finds them."""

from collections.abc import Callable
from typing import Any

from orpo_ray.config.objectives import AnyObjectiveConfig
from orpo_ray.objectives import cpo, dpo, ipo, kto, orpo, sft, simpo
from orpo_ray.objectives.base import LossParts, NllTokens, Objective, PairLogps, loss_parts
from orpo_ray.objectives.orpo import log_odds_ratio

_BUILDERS: dict[str, Callable[[Any], Objective]] = {
    "orpo": orpo.build,
    "dpo": dpo.build,
    "ipo": ipo.build,
    "simpo": simpo.build,
    "cpo": cpo.build,
    "sft": sft.build,
    "kto": kto.build,
}


def build_objective(config: AnyObjectiveConfig) -> Objective:
    """The objective that a config names."""
    return _BUILDERS[config.kind](config)


__all__ = ["LossParts", "NllTokens", "Objective", "PairLogps", "build_objective", "log_odds_ratio", "loss_parts"]
