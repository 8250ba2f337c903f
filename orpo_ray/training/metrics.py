"""Metrics of how well a model prefers the chosen answers.

No metric of a pair depends on lambda, beta or another setting of a loss.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orpo_ray.data.held import Pairs
from orpo_ray.errors import StoppedError
from orpo_ray.objectives import LossParts, Objective, PairLogps, log_odds, log_odds_ratio
from orpo_ray.runs.scores import INTERVAL_METRICS, PairScores
from orpo_ray.runs.single_answers import SingleAnswers
from orpo_ray.training.layout import collate
from orpo_ray.training.logprobs import pair_logps
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import cut_packs, deal, pack_costs
from orpo_ray.training.world import ALONE, World

PAIR_METRICS = ("accuracy", "margin", "chosen_logp", "rejected_logp", "log_odds_ratio")
SUM_METRICS = ("chosen_sum", "rejected_sum", "chosen_gain", "rejected_gain", "gain_accuracy")
"""Log-probs summed over tokens, which TRL reports for DPO and its relatives."""
_SHARES = ("nll", "preference", "loss")


def pair_metrics(pairs: PairLogps) -> Tensor:
    """Sums of PAIR_METRICS over pairs, [5].

    Log-probs are means per token, so the length of an answer does not count.
    """
    chosen, rejected = pairs.chosen_mean, pairs.rejected_mean
    margin = chosen - rejected
    columns = (
        (margin > 0).to(margin.dtype),
        margin,
        chosen,
        rejected,
        log_odds_ratio(pairs).to(margin.dtype),
    )
    return torch.stack(columns).sum(dim=1)


def sum_metrics(pairs: PairLogps) -> Tensor:
    """Sums of SUM_METRICS over pairs, [5].

    A gain is relative to the reference, or the summed log-prob itself if there is none.
    """
    has_reference = pairs.reference_chosen is not None
    zero = torch.zeros_like(pairs.chosen)
    reference_chosen, reference_rejected = pairs.reference if has_reference else (zero, zero)
    chosen, rejected = pairs.chosen - reference_chosen, pairs.rejected - reference_rejected
    better = (chosen > rejected).to(chosen.dtype)
    return torch.stack([pairs.chosen, pairs.rejected, chosen, rejected, better]).sum(dim=1)


class StepMetrics:
    """Sums a step's metrics on the device. The host reads them once, at the end of the step.

    SUM_METRICS are among them only if `with_sums` asks for them.
    """

    def __init__(self, objective: Objective, device: torch.device, with_sums: bool = False) -> None:
        self._objective = objective
        self._with_sums = with_sums and objective.needs_rejected
        self._of_pairs = len(PAIR_METRICS) + (len(SUM_METRICS) if self._with_sums else 0)
        self._sums = torch.zeros(self._of_pairs + len(_SHARES), device=device)

    def add(self, pairs: PairLogps, parts: LossParts, weight: float) -> None:
        """Add one pack."""
        with torch.no_grad():
            shares = torch.stack([pairs.nll_sum.sum(), parts.preference, parts.total])
            per_pair = shares.new_zeros(self._of_pairs)
            if self._objective.needs_rejected:
                per_pair = pair_metrics(pairs)
            if self._with_sums:
                per_pair = torch.cat([per_pair, sum_metrics(pairs)])
            self._sums = self._sums + weight * torch.cat([per_pair.to(shares.dtype), shares])

    @property
    def sums(self) -> Tensor:
        """The sums of this process; the trainer adds those of the others."""
        return self._sums

    def means(self, sums: list[float], pair_count: int, token_count: int) -> dict[str, float]:
        """The step's means, from the sums of all processes.

        `preference_share` is the preference term's share of the loss.
        """
        *per_pair, nll, preference, loss = sums
        result = {"nll": nll / token_count}
        if self._objective.needs_rejected:
            own = per_pair[: len(PAIR_METRICS)]
            result |= {
                name: value / pair_count for name, value in zip(PAIR_METRICS, own, strict=True)
            }
            result["preference_share"] = preference / loss if loss else 0.0
        return result

    def summed_means(self, sums: list[float], pair_count: int) -> dict[str, float]:
        """The step's means of SUM_METRICS; empty if they are not added up."""
        if not self._with_sums:
            return {}
        own = sums[len(PAIR_METRICS) : -len(_SHARES)]
        return {name: value / pair_count for name, value in zip(SUM_METRICS, own, strict=True)}


def score_pairs(
    model: PairModel,
    table: Pairs,
    pad_id: int,
    token_budget: int,
    stop_requested: Callable[[], bool] = lambda: False,
    world: World = ALONE,
) -> PairScores:
    """Log-probs of every pair of a table, without gradient and without dropout.

    A pair that appears several times in the table is scored once. The processes of `world` share
    the work, and each gets all scores. Raises StoppedError on request.
    """
    was_training = model.training
    model.eval()
    trained = table.trained
    sums = np.zeros((len(table), 2))
    _, distinct, copies = np.unique(table.pair_ids, return_index=True, return_inverse=True)
    costs = pack_costs(table.lengths, model.layout)
    for pack in deal(cut_packs(distinct, costs, token_budget), costs, world.size)[world.rank]:
        if stop_requested():
            raise StoppedError("stopped before the first step; the same command starts again")
        scored = score_pack(model, table, pack.pairs, pad_id)
        if pack.weight:
            sums[pack.pairs] = scored
    model.train(was_training)
    sums = world.sum(torch.from_numpy(sums).to(model.device)).cpu().numpy()[distinct][copies]
    return PairScores(sums[:, 0], sums[:, 1], trained[:, 1], trained[:, 2])


def score_pack(
    model: PairModel, table: Pairs, pairs: NDArray[np.int64], pad_id: int
) -> NDArray[np.float64]:
    """Summed log-probs [n, 2] of the pairs of one pack, in one forward pass.

    The model must be in evaluation mode.
    """
    batch = collate([table[i] for i in pairs], model.layout, pad_id, score_prompt=False).to(
        model.device
    )
    with torch.no_grad():
        scored = pair_logps(model(batch), batch)
    log_probs: NDArray[np.float64] = (
        torch.stack([scored.chosen, scored.rejected], dim=1).double().cpu().numpy()
    )
    return log_probs


def summarise(scores: PairScores) -> dict[str, float]:
    """The means that an evaluation reports; `nll` is per token of the chosen answers.

    Of single answers, those that need an answer of a kind that is not there are left out.
    """
    scores = scores.comparable
    if (single := scores.single_answers) is not None:
        return _of_single_answers(single)
    means = (pair_metrics(_as_logps(scores)) / len(scores)).tolist()
    nll = float(-scores.chosen.sum() / scores.chosen_tokens.sum())
    return dict(zip(PAIR_METRICS, means, strict=True)) | {"nll": nll}


def _of_single_answers(single: SingleAnswers) -> dict[str, float]:
    of_good, of_bad = (
        float(log_odds(torch.from_numpy(means)).mean())
        for means in (single.good_means, single.bad_means)
    )
    found = dict(zip(INTERVAL_METRICS, single.means().tolist(), strict=True))
    found["log_odds_ratio"] = of_good - of_bad
    return {name: value for name, value in found.items() if math.isfinite(value)}


def summarise_sums(scores: PairScores, reference: PairScores | None) -> dict[str, float]:
    """The means of SUM_METRICS at an evaluation; of single answers there are none."""
    scores, reference = scores.comparable, reference and reference.comparable
    if scores.single_answers is not None:
        return {}
    pairs = _as_logps(scores)
    if reference is not None:
        start = _as_logps(reference)
        pairs = replace(pairs, reference_chosen=start.chosen, reference_rejected=start.rejected)
    return dict(zip(SUM_METRICS, (sum_metrics(pairs) / len(scores)).tolist(), strict=True))


def _as_logps(scores: PairScores) -> PairLogps:
    return PairLogps(
        chosen=torch.from_numpy(scores.chosen),
        rejected=torch.from_numpy(scores.rejected),
        chosen_tokens=torch.from_numpy(scores.chosen_tokens),
        rejected_tokens=torch.from_numpy(scores.rejected_tokens),
        nll_sum=torch.from_numpy(-scores.chosen),
    )
