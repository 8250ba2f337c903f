"""DPO: direct preference optimisation (arXiv:2305.18290, equation 7; label smoothing as in its cDPO note)."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo_ray.config.objectives import DpoConfig
from orpo_ray.objectives.base import Objective, PairLogps


def log_ratio_margin(pairs: PairLogps) -> Tensor:
    """How much further the policy prefers the chosen answer than the reference does, [n]."""
    reference_chosen, reference_rejected = pairs.reference
    return (pairs.chosen - reference_chosen) - (pairs.rejected - reference_rejected)


def dpo_preference(pairs: PairLogps, beta: float, label_smoothing: float) -> Tensor:
    """-log sigmoid(beta * margin), and the same with the label flipped for the smoothed share, [n]."""
    scaled = beta * log_ratio_margin(pairs)
    return -(1 - label_smoothing) * logsigmoid(scaled) - label_smoothing * logsigmoid(-scaled)


def build(config: DpoConfig) -> Objective:
    """The DPO loss, with an NLL term where one is asked for."""
    return Objective(
        "dpo",
        lambda pairs: dpo_preference(pairs, config.beta, config.label_smoothing),
        nll_weight=config.nll_weight,
        nll_on=config.nll_on,
        needs_reference=True,
    )
