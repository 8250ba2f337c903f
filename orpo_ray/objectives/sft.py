"""Supervised fine-tuning on the chosen answers: the first of two stages, and the baseline to
beat.
"""

from orpo_ray.config.objectives.sft import SftConfig
from orpo_ray.objectives.base import Objective


def build(config: SftConfig) -> Objective:
    """The token-mean NLL; rejected answers are not even computed."""
    return Objective(kind="sft", preference=None, nll_weight=1.0, nll_on=config.nll_on)
