"""Log-probs of only the tokens that a loss needs: the full logits of a pack never exist."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from orpo_ray.objectives import PairLogps
from orpo_ray.training.layout import CHOSEN, PROMPT, REJECTED, PairBatch

# Float32 logits of one chunk: 2**24 values are 64 MiB.
LOGITS_PER_CHUNK = 2**24


class _Head(NamedTuple):
    """A linear head's weight [V, H] and bias [V], and what its model does to the logits."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    soft_cap: float | None

    def buffer(self, hidden: Tensor, rows: int) -> Tensor | None:
        """Memory for the float32 logits of `rows` rows, or None if they must be converted first.

        Reusing it helps a CPU: getting new memory takes longer than the product that fills it.
        """
        direct = self.bias is None and hidden.dtype == self.weight.dtype == torch.float32
        return hidden.new_empty(rows, len(self.weight)) if direct else None

    def logits(self, hidden: Tensor, into: Tensor | None = None) -> Tensor:
        """Logits [N, V] in float32; `into` is a `buffer` of at least N rows to write them to."""
        if into is not None:
            product = torch.mm(hidden, self.weight.t(), out=into[: len(hidden)])
        else:
            product = nn.functional.linear(hidden, self.weight, self.bias)
        return finish(product, self.scale, self.soft_cap)


def finish(logits: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """The logits in float32 as their model defines them.

    They are scaled, and if there is a `soft_cap`, bent smoothly to between -soft_cap and soft_cap.
    """
    logits = logits.float()
    if scale != 1.0:
        logits = logits * scale
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def score(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probs [N] of `targets` [N] under float32 logits [N, V]."""
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


class SelectedLogProbs(nn.Module):
    """The output head as a scorer: hidden states and target ids in, float32 log-probs out.

    If the head is a plain linear layer, this module owns its weight, so sharding gathers the weight
    once a call. An adapted or quantised head is called as it is. Some models change their logits:
    `scale`, `soft_cap`.
    """

    def __init__(
        self, head: nn.Module, vocabulary: int, scale: float = 1.0, soft_cap: float | None = None
    ) -> None:
        super().__init__()
        if type(head) is nn.Linear:
            self.weight, self.bias = head.weight, head.bias
            self.head = None
        else:
            self.head = head
        self.scale = scale
        self.soft_cap = soft_cap
        self.rows_per_chunk = max(1, LOGITS_PER_CHUNK // vocabulary)

    @property
    def is_frozen(self) -> bool:
        """Whether the head has no adapter, and neither it nor a tied embedding is trained."""
        return self.head is None and not any(
            parameter.requires_grad for parameter in self.parameters()
        )

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probs [N] of `targets` [N] given hidden states [N, H]."""
        if self.is_frozen:
            head = _Head(self.weight, self.bias, self.scale, self.soft_cap)
            log_probs: Tensor = _FrozenHead.apply(hidden, targets, head, self.rows_per_chunk)
            return log_probs
        rows = self.rows_per_chunk
        chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([self._score(h, t) for h, t in chunks])
        # Autograd would keep the logits of every chunk, so the backward pass computes them again.
        return torch.cat([checkpoint(self._score, h, t, use_reentrant=False) for h, t in chunks])

    def _score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self.head is None:
            head = _Head(self.weight, self.bias, self.scale, self.soft_cap)
            return score(head.logits(hidden), targets)
        return score(finish(self.head(hidden), self.scale, self.soft_cap), targets)


class _FrozenHead(torch.autograd.Function):
    """Log-probs of a head that is not trained, with two matrix products instead of three.

    The gradient of log p(y) in the logits is onehot(y) - p. The backward pass only multiplies each
    row of it by one factor. So the gradient is computed in the forward pass, while the logits
    exist, and the backward pass scales it.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: _Head, rows_per_chunk: int
    ) -> Tensor:
        log_probs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        kept = head.buffer(hidden, min(rows_per_chunk, len(hidden)))
        for start in range(0, len(hidden), rows_per_chunk):
            rows = slice(start, start + rows_per_chunk)
            into = None if gradient is None else gradient[rows]
            log_probs[rows] = _score_chunk(hidden[rows], targets[rows, None], head, kept, into)
        ctx.save_for_backward(gradient)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (above[:, None] * gradient).to(gradient.dtype), None, None, None


def _score_chunk(
    hidden: Tensor, targets: Tensor, head: _Head, kept: Tensor | None, gradient: Tensor | None
) -> Tensor:
    """Log-probs [n] of a chunk's `targets` [n, 1]; their gradient in `hidden` fills `gradient`.

    It is a function of its own so that its logits are gone before the next chunk's are computed.
    """
    logits = head.logits(hidden, kept)
    of_target, largest = logits.gather(-1, targets), logits.amax(-1, keepdim=True)
    slope = None
    if head.soft_cap is not None and gradient is not None:
        slope = 1 - (logits / head.soft_cap).square_()
    unscaled = logits.sub_(largest).exp_()
    total = unscaled.sum(-1, keepdim=True)
    if gradient is not None:
        of_logits = unscaled.div_(-total).scatter_add_(-1, targets, torch.ones_like(total))
        if slope is not None:
            of_logits.mul_(slope)
        gradient.copy_((of_logits.to(head.weight.dtype) @ head.weight) * head.scale)
    return (of_target - largest - total.log()).squeeze(-1)


def pair_logps(log_probs: Tensor, batch: PairBatch) -> PairLogps:
    """Sum the log-probs [N] of a batch's scored tokens into those of its n pairs."""
    n = len(batch.chosen_tokens)
    part_and_pair = batch.part * n + batch.pair
    sums = log_probs.new_zeros(3 * n).index_add(0, part_and_pair, log_probs).view(3, n)
    return PairLogps(
        chosen=sums[CHOSEN],
        rejected=sums[REJECTED],
        chosen_tokens=batch.chosen_tokens,
        rejected_tokens=batch.rejected_tokens,
        nll_sum=-(sums[CHOSEN] + sums[PROMPT]),
    )
