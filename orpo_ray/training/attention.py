"""Attention over one row that holds many answers: exact, without a mask of the row's square.

A row is cut into runs. A run's tokens see themselves causally and, where it shares a prompt, the
first tokens of the run before it. transformers hands the runs of a batch on to every layer's
attention, whatever the model.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from orpo_ray.errors import ConfigError

RUNS_ATTENTION = "orpo_ray_runs"
"""The name under which models find this attention; no mask is known by it, so none is built."""

VARLEN, SDPA = "flash varlen", "SDPA per run"
_UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask")
"""What a layer may ask of its attention that this one does not compute."""


@dataclass(frozen=True)
class Runs:
    """The runs of a row in order: run i has `lengths[i]` tokens, which also see `shared[i]` of the
    run before it.

    Plain numbers, since the device is not to be asked for them; `query_ends` and `key_ends` [runs +
    1] are the same for kernels that read them there.
    """

    lengths: tuple[int, ...]
    shared: tuple[int, ...]
    query_ends: Tensor
    key_ends: Tensor

    @staticmethod
    def of(runs: list[tuple[int, int]]) -> "Runs":
        """From (length, shared) of each run."""
        lengths, shared = zip(*runs, strict=True)
        queries = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        keys = queries + torch.tensor([0, *shared]).cumsum(0, dtype=torch.int32)
        return Runs(lengths, shared, queries, keys)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Runs":
        """The same with its tensors on another device."""
        return replace(
            self,
            query_ends=self.query_ends.to(device, non_blocking=non_blocking),
            key_ends=self.key_ends.to(device, non_blocking=non_blocking),
        )

    @property
    def longest(self) -> int:
        """Keys that the last token of the longest run sees."""
        return max(
            length + shared for length, shared in zip(self.lengths, self.shared, strict=True)
        )

    def keys(self, values: Tensor, dim: int) -> list[Tensor]:
        """Keys or values of the row as those that each run sees."""
        # Split, not sliced: the gradient of each slice would be a row of zeros but for its part.
        pieces = values.split(self.lengths, dim)
        return [
            torch.cat([pieces[i - 1].narrow(dim, 0, shared), piece], dim) if shared else piece
            for i, (piece, shared) in enumerate(zip(pieces, self.shared, strict=True))
        ]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    runs: Runs | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: queries [1, heads, T, D], keys and values [1, key heads, T, D];
    returns [1, T, heads, D].

    Raises ConfigError for a layer whose attention is more than causal.
    """
    if runs is None:
        raise ConfigError(
            f"training.layout: {type(module).__name__} is not told of the runs; use padded"
        )
    assert attention_mask is None and not dropout, (
        "no mask is known by our name, and a base's own dropout is off"
    )
    asked = [name for name in _UNKNOWN if others.get(name) is not None]
    if sliding_window is not None and sliding_window < runs.longest:
        asked.append(f"a window of {sliding_window}")
    if asked:
        raise ConfigError(
            f"training.layout: {type(module).__name__} computes attention with {asked[0]}; use "
            "padded"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = (
        query.to(value.dtype),
        key.to(value.dtype),
    )  # rotation leaves them in float32 under autocast
    varlen = None
    if query.is_cuda and value.shape[-1] == query.shape[-1]:
        varlen = find_varlen(
            query.device, value.dtype, query.shape[1] // key.shape[1], query.shape[-1]
        )
    if varlen is None:
        return _per_run(query, key, value, runs, scaling).transpose(1, 2).contiguous(), None
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    return varlen(q, k, v, runs, scaling)[None], None


AttentionInterface.register(RUNS_ATTENTION, attend)


def _per_run(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scaling: float) -> Tensor:
    """By torch's own attention, one call a run."""
    group = query.shape[1] // key.shape[1]
    if group > 1 and query.is_cuda:  # a GPU's kernels that take a mask take no groups
        key, value, group = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), 1
    outputs = []
    for q, k, v in zip(
        query.split(runs.lengths, 2), runs.keys(key, 2), runs.keys(value, 2), strict=True
    ):
        square = q.shape[2] == k.shape[2]
        mask = None if square else causal_lower_right(q.shape[2], k.shape[2])
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=square, scale=scaling, enable_gqa=group > 1
            )
        )
    return torch.cat(outputs, 2)


Varlen = Callable[[Tensor, Tensor, Tensor, Runs, float], Tensor]


@cache
def find_varlen(
    device: torch.device, dtype: torch.dtype, group: int, head_dim: int
) -> Varlen | None:
    """torch's flash attention over runs of any length, [T, heads, D]; None where this version or
    GPU has none.

    Tried on a small example, since its signature has changed between versions, and since shorter
    queries than keys must be aligned at their ends.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    attention = _adapt(varlen_attn)
    runs = Runs.of([(5, 0), (3, 2)]).to(device)
    generator = torch.Generator(device).manual_seed(0)
    heads = ((2 * group, 8), (2, 8), (2, 8))
    q, k, v = (
        torch.randn(h, t, head_dim, device=device, dtype=dtype, generator=generator)[None]
        for h, t in heads
    )
    scaling = head_dim**-0.5
    expected = _per_run(q.float(), k.float(), v.float(), runs, scaling)[0].transpose(0, 1)
    try:
        # It may be looked for while a model evaluates.
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            rows = [states[0].transpose(0, 1).requires_grad_() for states in (q, k, v)]
            found = attention(rows[0], rows[1], rows[2], runs, scaling)
            found.float().sum().backward()
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None
    return attention if torch.allclose(found.float(), expected, atol=0.05, rtol=0.05) else None


def _adapt(varlen_attn: Any) -> Varlen:
    """torch's varlen_attn in the form that its version has."""
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )
    if "enable_gqa" in known:
        options["enable_gqa"] = True

    def attention(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scaling: float) -> Tensor:
        if "scale" in known:
            options["scale"] = scaling
        else:
            query = query * (scaling * query.shape[-1] ** 0.5)
        if "enable_gqa" not in known:
            group = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        keys, values = torch.cat(runs.keys(key, 0)), torch.cat(runs.keys(value, 0))
        ends_and_longest = (runs.query_ends, runs.key_ends, max(runs.lengths), runs.longest)
        output: Tensor = varlen_attn(query, keys, values, *ends_and_longest, **options)
        return output

    return attention


def attention_path(device: torch.device, dtype: torch.dtype, group: int, head_dim: int) -> str:
    """Which of the two ways a model's attention over runs takes."""
    return SDPA if find_varlen(device, dtype, group, head_dim) is None else VARLEN
