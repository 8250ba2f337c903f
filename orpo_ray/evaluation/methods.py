"""The ways to write a trained model: which there are for a run, and which explains a difference."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from orpo_ray.config import RunConfig
from orpo_ray.config.model import ModelConfig
from orpo_ray.errors import ConfigError
from orpo_ray.models.base import fetch_base
from orpo_ray.models.hardware import DTYPES
from orpo_ray.models.merge import (
    AsTrained,
    Quantised,
    as_published,
    write_copy,
    write_merged,
)
from orpo_ray.models.trained import trained_folder
from orpo_ray.models.weights import Weights
from orpo_ray.runs.results import DEQUANTISED, NO_MERGE, ORIGINAL, Likeness
from orpo_ray.training.decisions import Decisions

AUTO = "auto"
"""All ways that fit a run, of which the nearest is kept."""

_STORED = {torch.float32: 0.0005, torch.float16: 0.005, torch.bfloat16: 0.03}
"""The largest difference of a log-prob per token that rounding the merged weights explains."""
_COMPUTED = {torch.float32: 0.0005, torch.float16: 0.02, torch.bfloat16: 0.1}
"""The same for rounding what is computed: an adapter beside its base adds up in another order."""
_ROUNDED_ACTIVATIONS = 0.05
"""The same, if training rounds activations to 8 bits, which no written model does."""

Write = Callable[[Path, Quantised], None]
"""Writes weights to a folder, given those that were quantised in training."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to write a model."""

    name: str
    source: Weights
    """The weights that it reads: the base's, or those of a whole model."""
    dtype: torch.dtype
    bytes: int
    """The size of the weights that it writes."""
    write: Write
    keeps_weights: bool
    """Whether the weights are those that training computed with, but for rounding."""


def methods_of(config: RunConfig, trained: str, merge: str, decisions: Decisions) -> list[Method]:
    """The ways that `merge` asks for. Raises ConfigError for one that does not fit the run."""
    if config.adapter.kind == "none":
        if merge not in (AUTO, NO_MERGE):
            raise ConfigError(
                f"merge: the run trained whole weights, so nothing is merged; leave out {merge}"
            )
        return [_copy(trained, decisions)]
    if merge == DEQUANTISED and config.model.quantization == "none":
        raise ConfigError(
            "merge: the run held its base in no quantised form, so there is nothing to dequantise; "
            f"use {ORIGINAL}"
        )
    return _merges(config.model, trained, merge, decisions)


def for_rounded_base(merge: str) -> str:
    """The way to merge an adapter that makes up for rounding: into the base that was rounded."""
    if merge == ORIGINAL:
        raise ConfigError(
            f"merge: the adapter makes up for the rounding to 4 bits (adapter.init: loftq), and "
            f"the base as it was published is not rounded; use {DEQUANTISED}"
        )
    return DEQUANTISED


def _copy(trained: str, decisions: Decisions) -> Method:
    """A whole model, in the number format in which training computed."""
    whole, dtype = Weights(trained_folder(trained)), DTYPES[decisions.dtype]
    return Method(
        name=NO_MERGE,
        source=whole,
        dtype=dtype,
        bytes=whole.numbers * dtype.itemsize,
        write=lambda folder, _: write_copy(whole, folder, dtype),
        keeps_weights=True,
    )


def _merges(model: ModelConfig, trained: str, merge: str, decisions: Decisions) -> list[Method]:
    """The adapter merged into its base, in the base's own number format."""
    base = Weights(fetch_base(model))
    _refuse_quantised(base.folder)
    held = model.quantization

    def original(folder: Path, quantised: Quantised) -> None:
        write_merged(model, base, trained, as_published, folder)

    def dequantised(folder: Path, quantised: Quantised) -> None:
        into = AsTrained(quantised, held, DTYPES[decisions.dtype], decisions.device)
        write_merged(model, base, trained, into, folder)

    ways: dict[str, Write] = {ORIGINAL: original, DEQUANTISED: dequantised}
    if held == "none":
        del ways[DEQUANTISED]
    return [
        Method(
            name=name,
            source=base,
            dtype=_dtype(base),
            bytes=base.bytes,
            write=write,
            keeps_weights=held == "none" or name == DEQUANTISED,
        )
        for name, write in ways.items()
        if merge in (AUTO, name)
    ]


def _refuse_quantised(base: Path) -> None:
    """Raise ConfigError for a base that was published in a quantised form."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise ConfigError(
            f"model.base: {base} was published in a quantised form, so no 16-bit model can be made "
            "of it; name the base as it was published in 16 bits, with model.base="
        )


def nearest(methods: Sequence[Method], candidates: Mapping[str, Likeness]) -> Method:
    """The way that changed log-probs least; of equal ones, the one with more equal answers.

    A single way needs no candidates.
    """
    if len(methods) == 1:
        return methods[0]

    def distance(method: Method) -> tuple[float, float]:
        like = candidates[method.name]
        return like.max_log_prob_difference, -(like.greedy_agreement or 0.0)

    return min(methods, key=distance)


def tolerance(stored: torch.dtype, decisions: Decisions, config: RunConfig) -> float:
    """The largest difference per token between a written model and one with the same weights."""
    is_int8 = config.model.quantization == "int8"
    activations = _ROUNDED_ACTIVATIONS if is_int8 else 0.0
    return _STORED[stored] + _COMPUTED[DTYPES[decisions.dtype]] + activations


def _dtype(base: Weights) -> torch.dtype:
    """The number format that most of a base's weights have."""
    sizes: dict[torch.dtype, int] = {}
    for shape in base.shapes.values():
        if shape.dtype in _STORED:
            sizes[shape.dtype] = sizes.get(shape.dtype, 0) + shape.numel()
    if not sizes:
        raise ConfigError(f"{base.folder}: its weights are in no number format of 16 or 32 bits")
    return max(sizes, key=sizes.__getitem__)
