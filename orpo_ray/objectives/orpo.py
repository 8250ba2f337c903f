"""ORPO: preference optimisation without a reference model (arXiv:2403.07691, equations 3 to 7).

The scale beta, and the loss without a likelihood term, are those of ORPO-beta (arXiv:2502.01237).
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo_ray.config.objectives.orpo import OrpoConfig
from orpo_ray.objectives.base import Objective, PairLogps

# The odds of a probability of 1 are infinite. At this log-prob, the highest that is used, float32
# still computes the odds well.
_LARGEST_LOG_PROB = -1e-6


def log_odds(log_prob: Tensor) -> Tensor:
    """log(p / (1 - p)) of a mean log-prob, computed in float32 and finite for any input up to 0."""
    log_prob = log_prob.float().clamp(max=_LARGEST_LOG_PROB)
    return log_prob - torch.log(-torch.expm1(log_prob))


def log_odds_ratio(pairs: PairLogps) -> Tensor:
    """The log of the ratio of the odds of the chosen and of the rejected answer, [n]."""
    return log_odds(pairs.chosen_mean) - log_odds(pairs.rejected_mean)


def orpo_preference(pairs: PairLogps, beta: float) -> Tensor:
    """-log sigmoid(beta * log odds ratio), [n]."""
    return -logsigmoid(beta * log_odds_ratio(pairs))


def build(config: OrpoConfig) -> Objective:
    """`nll_weight` times the NLL plus lambda times the odds-ratio term."""
    return Objective(
        kind="orpo",
        preference=lambda pairs: orpo_preference(pairs, config.beta),
        preference_weight=config.lambda_,
        nll_weight=config.nll_weight,
        nll_on=config.nll_on,
    )
