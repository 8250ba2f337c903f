"""CPO: contrastive preference optimisation (arXiv:2401.08417, equations 3 to 5)."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo_ray.config.objectives.cpo import CpoConfig
from orpo_ray.objectives.base import Objective, PairLogps


def cpo_preference(pairs: PairLogps, beta: float) -> Tensor:
    """-log sigmoid(beta * summed log-prob margin), [n]."""
    return -logsigmoid(beta * (pairs.chosen - pairs.rejected))


def build(config: CpoConfig) -> Objective:
    """The CPO loss: the contrast plus alpha times the NLL."""
    return Objective(
        kind="cpo",
        preference=lambda pairs: cpo_preference(pairs, config.beta),
        nll_weight=config.alpha,
        nll_on=config.nll_on,
    )
