"""Attention over one row that holds many answers: exact, without a mask of [row, row] values.

A row is cut into runs of tokens. The tokens of a run see one another causally. If a run shares a
prompt, its tokens also see the first tokens of the run before it. transformers passes the runs of a
batch on to the attention of every layer, for all models.
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
"""The name under which models find this attention; transformers builds no mask for it."""

VARLEN, SDPA = "flash varlen", "SDPA per run of tokens"
_UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask")
"""What a layer may ask for, and the attention of this module does not compute."""


@dataclass(frozen=True)
class Runs:
    """The runs of a row in order.

    Run i has `lengths[i]` tokens, which also see the first `shared[i]` tokens of the run before it.
    These are plain numbers, so that reading them does not wait for the device. `query_ends` and
    `key_ends` [runs + 1] say the same to kernels, on the device.
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
        """The same runs with their tensors on another device."""
        return replace(
            self,
            query_ends=self.query_ends.to(device, non_blocking=non_blocking),
            key_ends=self.key_ends.to(device, non_blocking=non_blocking),
        )

    @property
    def longest(self) -> int:
        """How many keys the last token of a run sees at most."""
        return max(
            length + shared for length, shared in zip(self.lengths, self.shared, strict=True)
        )

    def keys(self, values: Tensor, dim: int) -> list[Tensor]:
        """The keys or values that each run sees, from those of the row."""
        # Split, not sliced: the gradient of each slice would be as long as the row.
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
    """Attention of one layer.

    Takes queries [1, heads, T, D], keys and values [1, key heads, T, D]; returns [1, T, heads, D].
    Raises ConfigError for a layer that asks for more than causal attention.
    """
    if runs is None:
        raise ConfigError(
            f"training.layout: {type(module).__name__} does not get the runs of tokens of a row; "
            "use padded"
        )
    assert attention_mask is None and not dropout, (
        "transformers builds no mask for our name, and a base's own dropout is off"
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
    # Under autocast, rotation leaves queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
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
    """Attention by torch's own function, one call for each run."""
    group = query.shape[1] // key.shape[1]
    if group > 1 and query.is_cuda:  # on a GPU, kernels that take a mask take no groups
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        group = 1
    outputs = []
    queries, keys, values = query.split(runs.lengths, 2), runs.keys(key, 2), runs.keys(value, 2)
    for q, k, v in zip(queries, keys, values, strict=True):
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
    """torch's flash attention over runs of any length, [T, heads, D].

    Returns None if this version of torch or this GPU has none. It is tried on a small example:
    its signature differs between versions, and a run with fewer queries than keys must be aligned
    at its end.
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
        # The caller may be evaluating, with gradients off.
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            rows = [states[0].transpose(0, 1).requires_grad_() for states in (q, k, v)]
            found = attention(rows[0], rows[1], rows[2], runs, scaling)
            found.float().sum().backward()
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None
    return attention if torch.allclose(found.float(), expected, atol=0.05, rtol=0.05) else None


def _adapt(varlen_attn: Any) -> Varlen:
    """torch's varlen_attn with the options that this version knows."""
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
    """How a model's attention over runs is computed: `VARLEN` or `SDPA`."""
    return SDPA if find_varlen(device, dtype, group, head_dim) is None else VARLEN
