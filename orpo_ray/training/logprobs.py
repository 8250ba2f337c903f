"""Log-probs of only the tokens that a loss needs: the full logits of a pack never exist."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from orpo_ray.objectives import PairLogps
from orpo_ray.training.layout import CHOSEN, PROMPT, REJECTED, PairBatch

LOGITS_PER_TILE = 2**24
"""Float32 logits that exist at once: 64 MiB."""
ROWS_PER_TILE = 1024
"""At most so many rows of hidden states share a tile, if the vocabulary is large.

Each tile reads its part of the head from memory, so few rows would read it often.
"""


class Tile(NamedTuple):
    """How many rows of hidden states and entries of the vocabulary make the logits of a tile."""

    rows: int
    entries: int


def tile_of(rows: int, vocabulary: int) -> Tile:
    """The tile for so many rows: the whole vocabulary, or as much as fits with 1,024 of them."""
    high = min(rows, max(ROWS_PER_TILE, LOGITS_PER_TILE // vocabulary))
    return Tile(high, min(vocabulary, max(1, LOGITS_PER_TILE // high)))


class _Head(NamedTuple):
    """A linear head's weight [V, H] and bias [V], and what its model does to the logits."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    soft_cap: float | None

    def buffer(self, hidden: Tensor, tile: Tile) -> Tensor | None:
        """Memory for the float32 logits of a tile, or None if they must be converted first.

        Reusing it helps a CPU: getting new memory takes longer than the product that fills it.
        """
        direct = self.bias is None and hidden.dtype == self.weight.dtype == torch.float32
        return hidden.new_empty(tile.rows * tile.entries) if direct else None

    def logits(self, hidden: Tensor, entries: slice, into: Tensor | None) -> Tensor:
        """Float32 logits [N, entries] of entries of the vocabulary; `into` may be a `buffer`.

        They are finished in place, which autograd could not follow.
        """
        weight = self.weight[entries]
        if into is not None:
            place = into[: len(hidden) * len(weight)].view(len(hidden), len(weight))
            logits = torch.mm(hidden, weight.t(), out=place)
        else:
            bias = None if self.bias is None else self.bias[entries]
            logits = nn.functional.linear(hidden, weight, bias).float()
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits

    def slope(self, logits: Tensor) -> Tensor:
        """How fast capped logits follow those before the cap, whose scale is left out."""
        assert self.soft_cap is not None, "only a cap bends logits"
        return (logits / self.soft_cap).square_().neg_().add_(1)


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
        self.vocabulary = vocabulary

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
            tile = tile_of(len(hidden), len(self.weight))
            log_probs: Tensor = _FrozenHead.apply(hidden, targets, head, tile)
            return log_probs
        rows = max(1, LOGITS_PER_TILE // self.vocabulary)
        chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([self._score(h, t) for h, t in chunks])
        # Autograd would keep the logits of every chunk, so the backward pass computes them again.
        return torch.cat([checkpoint(self._score, h, t, use_reentrant=False) for h, t in chunks])

    def _score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self.head is None:
            logits = nn.functional.linear(hidden, self.weight, self.bias)
        else:
            logits = self.head(hidden)
        return score(finish(logits, self.scale, self.soft_cap), targets)


class _FrozenHead(torch.autograd.Function):
    """Log-probs of a head that is not trained, with two matrix products instead of three.

    The gradient of log p(y) in the logits is onehot(y) - p. The backward pass only multiplies each
    row of it by one factor. So the gradient is computed in the forward pass, while the logits
    exist, and the backward pass scales it.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: _Head, tile: Tile) -> Tensor:
        log_probs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        kept = head.buffer(hidden, tile)
        for start in range(0, len(hidden), tile.rows):
            rows = slice(start, start + tile.rows)
            softmax = _Softmax(hidden[rows], targets[rows, None], head, gradient is not None)
            for first in range(0, len(head.weight), tile.entries):
                softmax.add(slice(first, first + tile.entries), kept)
            log_probs[rows] = softmax.log_probs
            if gradient is not None:
                gradient[rows] = softmax.gradient
        ctx.save_for_backward(gradient)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (above[:, None] * gradient).to(gradient.dtype), None, None, None


class _Softmax:
    """The softmax of n rows over the vocabulary, a tile of it at a time.

    It keeps the largest logit so far and the sum of exp(logit - largest), as in arXiv:1805.02867,
    and the sum of the head's rows with these weights, which is what a gradient needs of all logits.
    """

    def __init__(self, hidden: Tensor, targets: Tensor, head: _Head, has_gradient: bool) -> None:
        self._hidden, self._targets, self._head = hidden, targets, head
        self._largest = torch.full_like(targets, -torch.inf, dtype=torch.float32)
        self._total = torch.zeros_like(self._largest)
        self._of_target = torch.zeros_like(self._largest)
        self._pull = torch.zeros_like(hidden, dtype=torch.float32) if has_gradient else None

    def add(self, entries: slice, kept: Tensor | None) -> None:
        """Take these entries of the vocabulary in; `kept` is a `buffer` for their logits."""
        head = self._head
        logits = head.logits(self._hidden, entries, kept)
        place = self._targets - entries.start
        is_here = (place >= 0) & (place < logits.shape[1])
        found = logits.gather(-1, place.clamp(0, logits.shape[1] - 1))
        self._of_target = torch.where(is_here, found, self._of_target)
        slope = None
        if head.soft_cap is not None and self._pull is not None:
            slope = head.slope(logits)
        largest = torch.maximum(self._largest, logits.amax(-1, keepdim=True))
        fade, self._largest = (self._largest - largest).exp_(), largest
        weights = logits.sub_(largest).exp_()
        self._total.mul_(fade).add_(weights.sum(-1, keepdim=True))
        if self._pull is not None:
            weights = weights if slope is None else weights.mul_(slope)
            rows = head.weight[entries]
            self._pull.mul_(fade)
            if rows.dtype == torch.float32:
                self._pull.addmm_(weights, rows)
            else:
                self._pull.add_(weights.to(rows.dtype) @ rows)

    @property
    def log_probs(self) -> Tensor:
        """Log-probs of the targets, [n]."""
        return (self._of_target - self._largest - self._total.log()).squeeze(-1)

    @property
    def gradient(self) -> Tensor:
        """Their gradient in the hidden states, [n, H]."""
        assert self._pull is not None, "asked for at the start"
        towards = self._head.weight[self._targets.squeeze(-1)].float()
        if self._head.soft_cap is not None:
            towards = towards * self._head.slope(self._of_target)
        return (towards - self._pull / self._total) * self._head.scale


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
