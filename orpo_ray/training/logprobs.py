"""Log-probs of just the tokens that a loss needs: full logits of a pack never exist."""

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
        """Memory for the logits of so many rows, where nothing has to be converted on the way to
        float32.
        """
        direct = self.bias is None and hidden.dtype == self.weight.dtype == torch.float32
        # Memory that a CPU has just been given costs it more than the product that fills it.
        return hidden.new_empty(rows, len(self.weight)) if direct else None

    def logits(self, hidden: Tensor, into: Tensor | None = None) -> Tensor:
        """Logits [N, V] in float32; in the memory of a `buffer` of at least N rows, if there is
        one.
        """
        if into is not None:
            product = torch.mm(hidden, self.weight.t(), out=into[: len(hidden)])
        else:
            product = nn.functional.linear(hidden, self.weight, self.bias)
        return finish(product, self.scale, self.soft_cap)


def finish(logits: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """Float32 logits as their model means them: scaled, and held smoothly between -soft_cap and
    soft_cap.
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

    A plain linear head is owned by its weight, so that sharding gathers it once a call; an adapted
    or quantised one is called as it is. `scale` and `soft_cap` are what some models do to their
    logits.
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
        """Whether the head, and an embedding tied to it, has neither a gradient nor an adapter."""
        return self.head is None and not any(
            parameter.requires_grad for parameter in self.parameters()
        )

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probs [N] of `targets` [N] given hidden states [N, H]."""
        if self.is_frozen:
            head = _Head(self.weight, self.bias, self.scale, self.soft_cap)
            log_probs: Tensor = _FrozenHead.apply(hidden, targets, head, self.rows_per_chunk)
            return log_probs
        # Autograd would keep the logits of every chunk; so they are computed again in the backward
        # pass.
        chunks = [
            checkpoint(self._score, h, t, use_reentrant=False)
            if torch.is_grad_enabled()
            else self._score(h, t)
            for h, t in zip(
                hidden.split(self.rows_per_chunk), targets.split(self.rows_per_chunk), strict=True
            )
        ]
        return torch.cat(chunks)

    def _score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self.head is None:
            return score(
                _Head(self.weight, self.bias, self.scale, self.soft_cap).logits(hidden), targets
            )
        return score(finish(self.head(hidden), self.scale, self.soft_cap), targets)


class _FrozenHead(torch.autograd.Function):
    """Log-probs of a head that is not trained: two matrix products in all, where checkpointed
    chunks take three.

    The gradient of log p(y) in the logits, onehot(y) - p, waits for nothing from above but one
    factor a row. So it is formed while the logits are there, and the backward pass only scales it.
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
            logits, y = head.logits(hidden[rows], kept), targets[rows, None]
            of_target, largest = logits.gather(-1, y), logits.amax(-1, keepdim=True)
            slope = (
                None
                if head.soft_cap is None or gradient is None
                else 1 - (logits / head.soft_cap).square_()
            )
            unscaled = logits.sub_(largest).exp_()
            total = unscaled.sum(-1, keepdim=True)
            log_probs[rows] = (of_target - largest - total.log()).squeeze(-1)
            if gradient is not None:
                of_logits = unscaled.div_(-total).scatter_add_(-1, y, torch.ones_like(total))
                if slope is not None:
                    of_logits.mul_(slope)
                gradient[rows] = (of_logits.to(head.weight.dtype) @ head.weight) * head.scale
        ctx.save_for_backward(gradient)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (above[:, None] * gradient).to(gradient.dtype), None, None, None


def pair_logps(log_probs: Tensor, batch: PairBatch) -> PairLogps:
    """Sum the scored tokens [N] of a batch into the log-probs of its n pairs."""
    n = len(batch.chosen_tokens)
    sums = (
        log_probs.new_zeros(3 * n).index_add(0, batch.part * n + batch.pair, log_probs).view(3, n)
    )
    return PairLogps(
        chosen=sums[CHOSEN],
        rejected=sums[REJECTED],
        chosen_tokens=batch.chosen_tokens,
        rejected_tokens=batch.rejected_tokens,
        nll_sum=-(sums[CHOSEN] + sums[PROMPT]),
    )
