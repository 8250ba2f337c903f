"""Reads from a base's configuration how its layers mix tokens; no weight is loaded."""

from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from orpo_ray.config.model import ModelConfig
from orpo_ray.errors import ConfigError
from orpo_ray.models.tokenizer import base_location, explain_load_error
from orpo_ray.models.traits import Traits

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def read_positions(config: ModelConfig) -> int | None:
    """How many tokens a base reads; None if its configuration does not say it."""
    return getattr(_read(config).get_text_config(), "max_position_embeddings", None)


def _read(config: ModelConfig) -> PreTrainedConfig:
    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(
            base_location(config), revision=config.revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(explain_load_error(config.base, "configuration", error)) from error
    return found


def read_traits(config: ModelConfig) -> Traits:
    """The traits of a base; no weight is loaded.

    Raises ConfigError if its configuration cannot be read.
    """
    found = _read(config)
    if type(found) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(
            f"model.base: {config.base} is of type {found.model_type}, which is no causal language "
            "model"
        )
    model_type: Any = AutoModelForCausalLM._model_mapping[type(found)]
    text = found.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ())
    return Traits(
        own_attention=not model_type._supports_attention_backend,
        recurrent=bool(layers - _ATTENTION_LAYERS) or model_type._is_stateful,
        router_loss=bool(getattr(text, "output_router_logits", False)),
        stretches_beyond=_stretches_beyond(text),
        attentions=tuple(_attentions(model_type)),
    )


def _attentions(model_type: type[PreTrainedModel]) -> Iterator[str]:
    # None: the base takes every kernel. A base that names its own kernels would download them in
    # place of flash-attn.
    kernels = getattr(model_type, "_compatible_flash_implementations", None)
    if model_type._supports_flash_attn and (kernels is None or "flash_attention_2" in kernels):
        yield "flash_attention_2"
    if model_type._supports_sdpa:
        yield "sdpa"
    yield "eager"


def _stretches_beyond(text: PreTrainedConfig) -> int | None:
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("longrope", "dynamic"):
        return None
    return int(rope.get("original_max_position_embeddings") or text.max_position_embeddings)
