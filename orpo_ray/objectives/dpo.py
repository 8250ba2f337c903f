"""DPO: direct preference optimisation (arXiv:2305.18290, equation 7), and losses on its log-ratios.

All take beta times the gains: the log-ratios of the policy to the reference. Label smoothing is
that of cDPO.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo_ray.config.objectives.dpo import SMOOTHED, DpoConfig
from orpo_ray.objectives.base import Objective, PairLogps


def _scaled_margin(pairs: PairLogps, beta: float) -> Tensor:
    """Beta times how much more than the reference the policy prefers the chosen answer, [n]."""
    chosen, rejected = pairs.gains
    return beta * (chosen - rejected)


def _smoothed(scaled: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(scaled), [n]. The loss of the flipped label has the weight `label_smoothing`."""
    return -(1 - label_smoothing) * logsigmoid(scaled) - label_smoothing * logsigmoid(-scaled)


def sigmoid_loss(pairs: PairLogps, config: DpoConfig) -> Tensor:
    """-log sigmoid(scaled margin), [n], the paper's."""
    return _smoothed(_scaled_margin(pairs, config.beta), config.label_smoothing)


def sigmoid_norm_loss(pairs: PairLogps, config: DpoConfig) -> Tensor:
    """-log sigmoid(scaled margin of the gains per token), [n] (Tulu 3, arXiv:2411.15124)."""
    chosen, rejected = pairs.mean_gains
    return _smoothed(config.beta * (chosen - rejected), config.label_smoothing)


def hinge_loss(pairs: PairLogps, config: DpoConfig) -> Tensor:
    """max(0, 1 - scaled margin), [n]: SLiC's hinge (arXiv:2305.10425), here on log-ratios."""
    return torch.relu(1 - _scaled_margin(pairs, config.beta))


def robust_loss(pairs: PairLogps, config: DpoConfig) -> Tensor:
    """The sigmoid loss, [n], without bias if the share `label_smoothing` of labels is flipped.

    arXiv:2403.00409.
    """
    scaled, share = _scaled_margin(pairs, config.beta), config.label_smoothing
    clean = (1 - share) * logsigmoid(scaled)
    flipped = share * logsigmoid(-scaled)
    return (flipped - clean) / (1 - 2 * share)


def apo_zero_loss(pairs: PairLogps, config: DpoConfig) -> Tensor:
    """1 - sigmoid(scaled chosen gain) + sigmoid(scaled rejected gain), [n].

    arXiv:2408.06266, equation 7, plus 1, so that it is above 0. It raises the chosen answer.
    """
    chosen, rejected = pairs.gains
    return 1 - torch.sigmoid(config.beta * chosen) + torch.sigmoid(config.beta * rejected)


def apo_down_loss(pairs: PairLogps, config: DpoConfig) -> Tensor:
    """Sigmoid(scaled chosen gain) + 1 - sigmoid(scaled margin), [n].

    arXiv:2408.06266, equation 8, plus 1, so that it is above 0. It lowers both answers, the
    rejected one more.
    """
    chosen, _ = pairs.gains
    margin = _scaled_margin(pairs, config.beta)
    return torch.sigmoid(config.beta * chosen) + 1 - torch.sigmoid(margin)


def nca_loss(pairs: PairLogps, config: DpoConfig) -> Tensor:
    """Each answer alone against the reference, [n] (arXiv:2402.05369).

    -log sigmoid(w) - log sigmoid(-w) / 2 - log sigmoid(-l) / 2, with w and l beta times the gains.
    """
    chosen, rejected = (config.beta * gain for gain in pairs.gains)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


_LOSSES: dict[str, Callable[[PairLogps, DpoConfig], Tensor]] = {
    "sigmoid": sigmoid_loss,
    "sigmoid-norm": sigmoid_norm_loss,
    "hinge": hinge_loss,
    "robust": robust_loss,
    "apo-zero": apo_zero_loss,
    "apo-down": apo_down_loss,
    "nca": nca_loss,
}


def build(config: DpoConfig) -> Objective:
    """The config's loss, plus `nll_weight` times the NLL."""
    loss = _LOSSES[config.loss]
    assert config.loss in SMOOTHED or not config.label_smoothing, "the config refuses it"
    return Objective(
        kind="dpo",
        preference=lambda pairs: loss(pairs, config),
        nll_weight=config.nll_weight,
        nll_on=config.nll_on,
        needs_reference=True,
    )
