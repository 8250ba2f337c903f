"""DPO: direct preference optimisation (arXiv:2305.18290, equation 7).

Label smoothing is that of cDPO. Two other losses take the same margin: the hinge of SLiC
(arXiv:2305.10425), here on log-ratios, and robust DPO (arXiv:2403.00409).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo_ray.config.objectives.dpo import DpoConfig
from orpo_ray.objectives.base import Objective, PairLogps


def log_ratio_margin(pairs: PairLogps) -> Tensor:
    """How much more than the reference the policy prefers the chosen answer, [n]."""
    reference_chosen, reference_rejected = pairs.reference
    return (pairs.chosen - reference_chosen) - (pairs.rejected - reference_rejected)


def sigmoid_loss(scaled: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(scaled), [n]. The loss of the flipped label has the weight `label_smoothing`."""
    return -(1 - label_smoothing) * logsigmoid(scaled) - label_smoothing * logsigmoid(-scaled)


def hinge_loss(scaled: Tensor, label_smoothing: float) -> Tensor:
    """max(0, 1 - scaled), [n]; the config refuses label smoothing with it."""
    assert not label_smoothing
    return torch.relu(1 - scaled)


def robust_loss(scaled: Tensor, label_smoothing: float) -> Tensor:
    """The sigmoid loss, [n], without bias if the share `label_smoothing` of labels is flipped."""
    clean = (1 - label_smoothing) * logsigmoid(scaled)
    flipped = label_smoothing * logsigmoid(-scaled)
    return (flipped - clean) / (1 - 2 * label_smoothing)


_LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sigmoid": sigmoid_loss,
    "hinge": hinge_loss,
    "robust": robust_loss,
}


def build(config: DpoConfig) -> Objective:
    """The config's loss, applied to beta times the margin, plus `nll_weight` times the NLL."""
    loss = _LOSSES[config.loss]

    def preference(pairs: PairLogps) -> Tensor:
        return loss(config.beta * log_ratio_margin(pairs), config.label_smoothing)

    return Objective(
        kind="dpo",
        preference=preference,
        nll_weight=config.nll_weight,
        nll_on=config.nll_on,
        needs_reference=True,
    )
