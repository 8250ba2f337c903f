"""Changes of a config that save memory, for a run that does not fit."""

from collections.abc import Iterator
from typing import Any

from orpo_ray.config import RunConfig


def changes(config: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes that save memory, the cheapest first: what it costs in time and in quality."""
    wanted: list[dict[str, Any]] = []
    if config.model.dtype == "bfloat16":
        wanted.append({"model.dtype": "auto"})
    if config.training.gradient_checkpointing is not True:
        wanted.append({"training.gradient_checkpointing": True})
    if config.training.tokens_per_microbatch != "auto":
        wanted.append({"training.tokens_per_microbatch": "auto"})
    if config.model.dtype == "float32":
        wanted.append({"model.dtype": "auto"})
    if config.adapter.kind == "lora" and config.model.quantization != "nf4":
        wanted.append({"model.quantization": "nf4"})
    if config.training.optimizer == "adamw":
        wanted.append({"training.optimizer": "adamw-8bit"})
    if config.adapter.kind == "none":
        wanted.append({"adapter.kind": "lora"})
        wanted.append({"adapter.kind": "lora", "model.quantization": "nf4"})
    for values in wanted:
        yield " ".join(f"{key}={_written(value)}" for key, value in values.items()), values


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
