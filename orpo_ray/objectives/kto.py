"""KTO (arXiv:2402.01306). TRL's trainer computes the loss and its reference; ours cannot."""

from torch import Tensor

from orpo_ray.config.objectives.kto import KtoConfig
from orpo_ray.objectives.base import Objective, PairLogps


def _preference(pairs: PairLogps) -> Tensor:
    raise AssertionError("the config lets KTO run with engine: trl only")


def build(config: KtoConfig) -> Objective:
    """What the rest of a run needs to know: both answers take part."""
    return Objective(kind=config.kind, preference=_preference)
