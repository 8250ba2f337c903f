"""What a base's configuration says of how its layers mix tokens: the layouts of pairs and the
attention it takes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from orpo_ray.config.model import ModelConfig
from orpo_ray.errors import ConfigError
from orpo_ray.models.hardware import ATTENTIONS
from orpo_ray.models.tokenizer import base_location, explain_load_error

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Of a base. `window`: tokens that a layer looks back at most, None where every layer sees all.

    `own_attention`: its layers do not ask transformers' attention interface, so ours cannot stand
    in for theirs. `recurrent`: layers carry a state from token to token. `router_loss`: it asks for
    a loss of its experts' router. `stretches_beyond`: tokens from which on the longest row of a
    batch changes the positions of all, if any. `attentions`: those of ATTENTIONS that its layers
    know.
    """

    own_attention: bool = False
    recurrent: bool = False
    soft_cap: bool = False
    router_loss: bool = False
    window: int | None = None
    stretches_beyond: int | None = None
    attentions: tuple[str, ...] = ATTENTIONS


def read_traits(config: ModelConfig) -> Traits:
    """The traits of a base; no weight is loaded.

    Raises ConfigError where it has no readable configuration.
    """
    try:
        found = AutoConfig.from_pretrained(
            base_location(config), revision=config.revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(explain_load_error(config.base, "configuration", error)) from error
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
        soft_cap=getattr(text, "attn_logit_softcapping", None) is not None,
        router_loss=bool(getattr(text, "output_router_logits", False)),
        window=_window(text, layers),
        stretches_beyond=_stretches_beyond(text),
        attentions=tuple(_attentions(model_type)),
    )


def _attentions(model_type: type[PreTrainedModel]) -> Iterator[str]:
    # None: every kernel will do; a base that names its own would have them fetched in place of
    # flash-attn.
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


def _window(text: PreTrainedConfig, layers: set[str]) -> int | None:
    """The narrowest window that a layer has."""
    found = []
    if getattr(text, "use_sliding_window", True) and (not layers or "sliding_attention" in layers):
        found.append(getattr(text, "sliding_window", None))
    if "chunked_attention" in layers:
        found.append(getattr(text, "attention_chunk_size", None))
    return min((window for window in found if window is not None), default=None)
