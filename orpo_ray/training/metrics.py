"""Numbers that tell how well a model prefers; none of them depends on lambda, beta or another setting of a loss."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orpo_ray.data.store import PairTable
from orpo_ray.errors import StoppedError
from orpo_ray.objectives import LossParts, Objective, PairLogps, log_odds_ratio
from orpo_ray.training.layout import collate_padded, longer_side
from orpo_ray.training.logprobs import pair_logps
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import cut_packs

PAIR_METRICS = ("accuracy", "margin", "chosen_logp", "rejected_logp", "log_odds_ratio")
_NLL, _PREFERENCE, _LOSS = "nll", "preference", "loss"


@dataclass(frozen=True)
class PairScores:
    """Summed log-probs of both answers and their token counts, each [n]."""

    chosen: NDArray[np.float64]
    rejected: NDArray[np.float64]
    chosen_tokens: NDArray[np.int64]
    rejected_tokens: NDArray[np.int64]


def pair_metrics(pairs: PairLogps) -> Tensor:
    """Sums over pairs of PAIR_METRICS, [5]; log-probs are per token, so that length does not count."""
    chosen, rejected = pairs.chosen_mean, pairs.rejected_mean
    margin = chosen - rejected
    columns = ((margin > 0).to(margin.dtype), margin, chosen, rejected, log_odds_ratio(pairs).to(margin.dtype))
    return torch.stack(columns).sum(dim=1)


class StepMetrics:
    """Sums up a step's metrics on the device; the host looks at them once, when the step is logged."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self._objective = objective
        self._sums = torch.zeros(len(PAIR_METRICS), device=device)
        self._shares = dict.fromkeys((_NLL, _PREFERENCE, _LOSS), torch.zeros((), device=device))

    def add(self, pairs: PairLogps, parts: LossParts, weight: float) -> None:
        """Count one pack."""
        with torch.no_grad():
            if self._objective.needs_rejected:
                self._sums = self._sums + weight * pair_metrics(pairs)
            shares = {_NLL: pairs.nll_sum.sum(), _PREFERENCE: parts.preference, _LOSS: parts.total}
            self._shares = {name: self._shares[name] + weight * share.detach() for name, share in shares.items()}

    def result(self, pair_count: int, token_count: int) -> dict[str, float]:
        """The step's means, plain floats; `preference_share` is the preference term's part of the loss."""
        nll, preference, loss = torch.stack(list(self._shares.values())).tolist()
        result = {"nll": nll / token_count}
        if self._objective.needs_rejected:
            means = (self._sums / pair_count).tolist()
            result |= dict(zip(PAIR_METRICS, means, strict=True))
            result["preference_share"] = preference / loss if loss else 0.0
        return result


def score_pairs(
    model: PairModel,
    table: PairTable,
    pad_id: int,
    token_budget: int,
    stop_requested: Callable[[], bool] = lambda: False,
) -> PairScores:
    """Log-probs of every pair of a table, without gradient and without dropout. Raises StoppedError on request.

    A pair that stands in the table several times is scored once.
    """
    was_training = model.training
    model.eval()
    lengths = table.lengths
    sums = np.zeros((len(table), 2))
    _, distinct, copies = np.unique(table.pair_ids, return_index=True, return_inverse=True)
    for pack in cut_packs(distinct, longer_side(lengths), token_budget):
        if stop_requested():
            raise StoppedError("stopped before the first step; the same command starts again")
        batch = collate_padded([table[i] for i in pack], pad_id, score_prompt=False).to(model.device)
        with torch.no_grad():
            scored = pair_logps(model(batch), batch)
        sums[pack] = torch.stack([scored.chosen, scored.rejected], dim=1).double().cpu().numpy()
    model.train(was_training)
    sums = sums[distinct][copies]
    return PairScores(sums[:, 0], sums[:, 1], lengths[:, 1], lengths[:, 2])


def summarise(scores: PairScores) -> dict[str, float]:
    """The means that an evaluation reports; `nll` is per token of the chosen answers."""
    columns = (scores.chosen, scores.rejected, scores.chosen_tokens, scores.rejected_tokens, -scores.chosen)
    pairs = PairLogps(*(torch.from_numpy(column) for column in columns))
    means = (pair_metrics(pairs) / len(scores.chosen)).tolist()
    nll = float(-scores.chosen.sum() / scores.chosen_tokens.sum())
    return dict(zip(PAIR_METRICS, means, strict=True)) | {"nll": nll}
