"""SimPO: a reward per token, without a reference, and a target margin.

arXiv:2405.14734, equation 6.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo_ray.config.objectives.simpo import SimpoConfig
from orpo_ray.objectives.base import Objective, PairLogps


def simpo_preference(pairs: PairLogps, beta: float, gamma_beta_ratio: float) -> Tensor:
    """-log sigmoid(beta * (mean log-prob margin) - gamma) with gamma = ratio * beta, [n]."""
    return -logsigmoid(beta * (pairs.chosen_mean - pairs.rejected_mean - gamma_beta_ratio))


def build(config: SimpoConfig) -> Objective:
    """The SimPO loss. Unlike TRL's it has no NLL term."""
    return Objective(
        kind="simpo",
        preference=lambda pairs: simpo_preference(pairs, config.beta, config.gamma_beta_ratio),
    )
