"""Log-probs of just the tokens that a loss needs: full logits of a pack never exist."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orpo_ray.objectives import PairLogps
from orpo_ray.training.layout import CHOSEN, PROMPT, REJECTED, PairBatch

# Float32 logits of one chunk: 2**25 values are 128 MiB.
LOGITS_PER_CHUNK = 2**25


class SelectedLogProbs(nn.Module):
    """The output head as a scorer: hidden states and target ids in, float32 log-probs out.

    A plain linear head is owned by its weight, so that sharding gathers it once a call; an adapted or quantised one
    is called as it is. `scale` and `soft_cap` are what some models do to their logits.
    """

    def __init__(self, head: nn.Module, vocabulary: int, scale: float = 1.0, soft_cap: float | None = None) -> None:
        super().__init__()
        if type(head) is nn.Linear:
            self.weight, self.bias = head.weight, head.bias
            self.head = None
        else:
            self.head = head
        self.scale = scale
        self.soft_cap = soft_cap
        self.rows_per_chunk = max(1, LOGITS_PER_CHUNK // vocabulary)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probs [N] of `targets` [N] given hidden states [N, H], chunk by chunk, recomputed in the backward."""
        chunks = [
            checkpoint(self._score, h, t, use_reentrant=False) if torch.is_grad_enabled() else self._score(h, t)
            for h, t in zip(hidden.split(self.rows_per_chunk), targets.split(self.rows_per_chunk), strict=True)
        ]
        return torch.cat(chunks)

    def _score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = nn.functional.linear(hidden, self.weight, self.bias) if self.head is None else self.head(hidden)
        logits = logits.float() * self.scale
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def pair_logps(log_probs: Tensor, batch: PairBatch) -> PairLogps:
    """Sum the scored tokens [N] of a batch into the log-probs of its n pairs."""
    n = len(batch.chosen_tokens)
    sums = log_probs.new_zeros(3 * n).index_add(0, batch.part * n + batch.pair, log_probs).view(3, n)
    return PairLogps(
        chosen=sums[CHOSEN],
        rejected=sums[REJECTED],
        chosen_tokens=batch.chosen_tokens,
        rejected_tokens=batch.rejected_tokens,
        nll_sum=-(sums[CHOSEN] + sums[PROMPT]),
    )
