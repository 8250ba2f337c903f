"""Supervised fine-tuning on the chosen answers: a first stage, or a baseline to compare with."""

from orpo_ray.config.objectives.sft import SftConfig
from orpo_ray.objectives.base import Objective


def build(config: SftConfig) -> Objective:
    """The mean NLL per token; rejected answers are not computed."""
    return Objective(kind="sft", preference=None, nll_weight=1.0, nll_on=config.nll_on)
