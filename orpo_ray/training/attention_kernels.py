"""How attention over the runs of a row is computed: torch's kernels, and plain torch for the rest.

Queries are [1, heads, T, D], keys and values [1, key heads, T, D].
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention

from orpo_ray.training.runs import ALL_BEFORE, Block, Reach, Runs, blocks_of

_FEW = 8
"""A run whose keys are more than its queries by so small a part of them gets queries for all."""
VARLEN, SDPA = "flash varlen", "SDPA per run of tokens"


@dataclass(frozen=True)
class Scores:
    """How a layer makes weights of its scores, besides being causal.

    `cap`: scores are bent smoothly to between -cap and cap. `sinks` [heads]: a score for no token
    at all, which takes its share of the weights.
    """

    scaling: float
    reach: Reach = ALL_BEFORE
    cap: float | None = None
    sinks: Tensor | None = None

    @property
    def are_plain(self) -> bool:
        """Whether torch's kernels compute them."""
        return self.cap is None and self.sinks is None


def per_run(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scores: Scores) -> Tensor:
    """Attention [1, heads, T, D], block by block of each run."""
    group = query.shape[1] // key.shape[1]
    if group > 1 and (query.is_cuda or not scores.are_plain):
        # On a GPU, kernels that take a mask take no groups.
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    attention = _by_kernel if scores.are_plain else _by_hand
    outputs = []
    queries, keys, values = query.split(runs.lengths, 2), runs.keys(key, 2), runs.keys(value, 2)
    for i, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        blocks = list(blocks_of(runs.lengths[i], runs.shared[i], scores.reach))
        for block, part in zip(blocks, q.split([b.stop - b.start for b in blocks], 2), strict=True):
            seen = runs.shared[i] + block.stop - block.first
            outputs.append(
                attention(
                    part,
                    k.narrow(2, block.first, seen),
                    v.narrow(2, block.first, seen),
                    block,
                    scores,
                )
            )
    return torch.cat(outputs, 2)


def _by_kernel(q: Tensor, k: Tensor, v: Tensor, block: Block, scores: Scores) -> Tensor:
    """One block by torch's own function."""
    queries, keys = q.shape[2], k.shape[2]
    mask: Any = None
    before = 0
    if block.window is not None:
        mask = _band(queries, keys, block.window, q.device)
    elif 0 < keys - queries <= queries // _FEW and not q.is_cuda:
        # Queries for all keys need no mask, which a CPU writes out and keeps.
        before = keys - queries
        q = pad(q, (0, 0, before, 0))
    elif queries != keys:
        mask = causal_lower_right(queries, keys)
    output = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scores.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output.narrow(2, before, queries)


def _by_hand(q: Tensor, k: Tensor, v: Tensor, block: Block, scores: Scores) -> Tensor:
    """One block for layers that no kernel of torch computes: caps (Gemma 2), sinks (GPT-OSS)."""
    weights = (q @ k.transpose(2, 3)).float() * scores.scaling
    if scores.cap is not None:
        weights = scores.cap * torch.tanh(weights / scores.cap)
    queries, keys = q.shape[2], k.shape[2]
    seen = _band(queries, keys, block.window or keys, q.device)
    weights = weights.masked_fill(~seen, -torch.inf)
    if scores.sinks is not None:
        nothing = scores.sinks.float().reshape(1, -1, 1, 1).expand(1, -1, queries, 1)
        weights = torch.cat([weights, nothing], 3)
    return weights.softmax(3)[..., :keys].to(v.dtype) @ v


def _band(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Which key each query sees, [queries, keys]; the last query stands at the last key."""
    place = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    return (key <= place) & (key > place - window)


Varlen = Callable[[Tensor, Tensor, Tensor, Runs, Scores], Tensor]


@cache
def find_varlen(
    device: torch.device, dtype: torch.dtype, group: int, head_dim: int, has_window: bool = False
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
    attention = adapt(varlen_attn, has_window)
    if attention is None:
        return None
    runs = Runs.of([(5, 0), (3, 2)]).to(device)
    generator = torch.Generator(device).manual_seed(0)
    heads = ((2 * group, 8), (2, 8), (2, 8))
    q, k, v = (
        torch.randn(h, t, head_dim, device=device, dtype=dtype, generator=generator)[None]
        for h, t in heads
    )
    scores = Scores(head_dim**-0.5, Reach(window=2 if has_window else None))
    expected = per_run(q.float(), k.float(), v.float(), runs, scores)[0].transpose(0, 1)
    try:
        # The caller may be evaluating, with gradients off.
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            rows = [states[0].transpose(0, 1).requires_grad_() for states in (q, k, v)]
            found = attention(rows[0], rows[1], rows[2], runs, scores)
            found.float().sum().backward()
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None
    return attention if torch.allclose(found.float(), expected, atol=0.05, rtol=0.05) else None


def adapt(varlen_attn: Any, has_window: bool = False) -> Varlen | None:
    """torch's varlen_attn with the options that this version knows; None if it knows no windows."""
    known = inspect.signature(varlen_attn).parameters
    if has_window and "window_size" not in known:
        return None

    def attention(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scores: Scores) -> Tensor:
        options: dict[str, Any] = {}
        if "window_size" in known:
            window = scores.reach.window
            options["window_size"] = (-1 if window is None else window - 1, 0)
        else:
            options["is_causal"] = True
        if "scale" in known:
            options["scale"] = scores.scaling
        else:
            query = query * (scores.scaling * query.shape[-1] ** 0.5)
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
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
