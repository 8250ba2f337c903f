"""IPO: identity preference optimisation (arXiv:2310.12036, equation 17; beta is its tau)."""

from typing import Literal

from torch import Tensor

from orpo_ray.config.objectives.ipo import IpoConfig
from orpo_ray.objectives.base import Objective, PairLogps


def ipo_preference(
    pairs: PairLogps, beta: float, log_probs: Literal["sum", "token-mean"]
) -> Tensor:
    """Squared distance of the log-ratio margin from 1 / (2 beta), [n]."""
    chosen, rejected = pairs.mean_gains if log_probs == "token-mean" else pairs.gains
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def build(config: IpoConfig) -> Objective:
    """The IPO loss, over summed or token-mean log-probs."""
    return Objective(
        kind="ipo",
        preference=lambda pairs: ipo_preference(pairs, config.beta, config.log_probs),
        needs_reference=True,
    )
