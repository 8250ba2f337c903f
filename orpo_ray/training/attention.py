"""Attention over one row that holds many answers: exact, without a mask of [row, row] values.

transformers passes the runs of a batch on to the attention of every layer, for all models.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from orpo_ray.errors import ConfigError
from orpo_ray.training.attention_kernels import Scores, find_varlen, per_run
from orpo_ray.training.runs import Reach, Runs

RUNS_ATTENTION = "orpo_ray_runs"
"""The name under which models find this attention; transformers builds no mask for it."""

_UNKNOWN = ("position_bias", "head_mask", "sinks", "indices", "block_indices")
"""What a layer may ask for, and the attention of this module does not compute."""


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer.

    Takes queries [1, heads, T, D], keys and values [1, key heads, T, D]; returns [1, T, heads, D].
    Raises ConfigError for a layer that asks for more than is computed here.
    """
    if runs is None:
        raise ConfigError(
            f"training.layout: {type(module).__name__} does not get the runs of tokens of a row; "
            "use padded"
        )
    assert attention_mask is None and not dropout, (
        "transformers builds no mask for our name, and a base's own dropout is off"
    )
    for name in _UNKNOWN:
        if others.get(name) is not None:
            raise ConfigError(
                f"training.layout: {type(module).__name__} computes attention with {name}; use "
                "padded"
            )
    reach = _reach(module, sliding_window).within(runs.longest)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = Scores(scaling, reach, softcap, s_aux)
    query = _by_place_in_text(module, query, runs)
    # Under autocast, rotation leaves queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    varlen = None
    if _fits_varlen(query, value, scores):
        group, has_window = query.shape[1] // key.shape[1], reach.window is not None
        varlen = find_varlen(query.device, value.dtype, group, query.shape[-1], has_window)
    if varlen is None:
        return per_run(query, key, value, runs, scores).transpose(1, 2).contiguous(), None
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    return varlen(q, k, v, runs, scores)[None], None


AttentionInterface.register(RUNS_ATTENTION, attend)


def _fits_varlen(query: Tensor, value: Tensor, scores: Scores) -> bool:
    is_plain = scores.are_plain and scores.reach.chunk is None
    return query.is_cuda and value.shape[-1] == query.shape[-1] and is_plain


def _reach(module: nn.Module, sliding_window: int | None) -> Reach:
    """How far back the tokens of a layer see.

    Some families tell it to the attention. Others say it only in the mask that transformers makes
    from the configuration, which this attention does without.
    """
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[module.layer_idx] if kinds else None
    if kind == "chunked_attention":
        return Reach(chunk=config.attention_chunk_size)
    if sliding_window is None:
        slides = (
            kind == "sliding_attention" if kinds else getattr(config, "use_sliding_window", True)
        )
        sliding_window = getattr(config, "sliding_window", None) if slides else None
    return Reach(window=sliding_window)


def _by_place_in_text(module: nn.Module, query: Tensor, runs: Runs) -> Tensor:
    """Llama 4's queries, which it has scaled by a token's place in the row, by that in its text.

    Its layers without rotation do so (arXiv:2501.19399).
    """
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query
    layer: Any = module

    def scale(places: Tensor) -> Tensor:
        steps = torch.floor((places.float() + 1.0) / layer.floor_scale)
        return torch.log1p(steps) * layer.attn_scale + 1.0

    places = torch.arange(query.shape[2], device=query.device)
    factor = scale(runs.positions(query.device)) / scale(places)
    return query * factor.to(query.dtype)[None, None, :, None]
