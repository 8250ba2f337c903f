"""Which layers the bases of each family have, by what transformers builds from a config.json.

A test builds every family on torch's meta device and compares.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Settings = Mapping[str, Any]

_QKV = ("query", "key", "value")
_ATTENTION = (*_QKV, "out")
MLP_ROLES = ("gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The names of the settings of a mixture of experts, and whether PEFT adapts its experts."""

    number: str
    size: str
    shared_size: str = ""
    adapted: bool = True


def never(settings: Settings, index: int) -> bool:
    """No layer has a window."""
    return False


def always(settings: Settings, index: int) -> bool:
    """Every layer has one, whatever `layer_types` says."""
    return True


def _after_full_layers(settings: Settings, index: int) -> bool:
    return index >= int(settings["max_window_layers"])


def _every_other(settings: Settings, index: int) -> bool:
    return index % 2 == 0


def _all_but_every_sixth(settings: Settings, index: int) -> bool:
    return (index + 1) % int(settings.get("sliding_window_pattern", 6)) != 0


def _all_but_every_fourth(settings: Settings, index: int) -> bool:
    return (index + 1) % 4 != 0


def _every_other_before(settings: Settings, index: int) -> bool:
    return index % 2 == 0 and index < int(settings["max_window_layers"])


def _without_rotation(settings: Settings, index: int) -> bool:
    rotated: list[int] | None = settings.get("no_rope_layers")
    if rotated is not None:
        return not rotated[index]
    return (index + 1) % int(settings.get("no_rope_layer_interval", 4)) == 0


_SEPARATE = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
}
_GATED = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
_TWO_LAYERS = {"up": "mlp.c_fc", "down": "mlp.c_proj"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How transformers builds the bases of one family.

    `attention` and `mlp` name the linear layers by their role. `biased` maps a setting to the roles
    that have a bias if it is true; the setting "" is always true. `norms` counts the norms of a
    layer, `query_norms` says what those of queries and keys span: "head", or "all" heads.
    `defaults` is what transformers takes where a config.json is silent, `fixed` what a setting must
    be for this description to hold, and `keys` maps our names of settings to the family's own.
    """

    attention: Mapping[str, str] = field(default_factory=lambda: _SEPARATE)
    mlp: Mapping[str, str] = field(default_factory=lambda: _GATED)
    biased: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    norms: int = 2
    norm_bias: bool = False
    query_norms: str = ""
    head_bias: bool = False
    has_positions: bool = False
    experts: Experts | None = None
    slides: Callable[[Settings, int], bool] = never
    defaults: Settings = field(default_factory=dict)
    fixed: Settings = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    prefix: str = "model.layers"
    embedding: str = "model.embed_tokens"


_WINDOW_ON_REQUEST = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {
    "llama": Family(biased={"attention_bias": _ATTENTION, "mlp_bias": MLP_ROLES}),
    "mistral": Family(slides=always, defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "mixtral": Family(
        experts=Experts(number="num_local_experts", size="intermediate_size"),
        slides=always,
        defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2": Family(
        biased={"": _QKV},
        slides=_after_full_layers,
        defaults={"num_key_value_heads": 32, **_WINDOW_ON_REQUEST},
    ),
    "qwen2_moe": Family(
        biased={"qkv_bias": _QKV},
        experts=Experts(
            number="num_experts",
            size="moe_intermediate_size",
            shared_size="shared_expert_intermediate_size",
            adapted=False,
        ),
        slides=_every_other_before,
        defaults={
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            **_WINDOW_ON_REQUEST,
        },
    ),
    "qwen3": Family(
        biased={"attention_bias": _ATTENTION},
        query_norms="head",
        slides=_after_full_layers,
        defaults={"num_key_value_heads": 32, "head_dim": 128, **_WINDOW_ON_REQUEST},
    ),
    "qwen3_moe": Family(
        biased={"attention_bias": _ATTENTION},
        query_norms="head",
        experts=Experts(number="num_experts", size="moe_intermediate_size"),
        slides=always,
        defaults={
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "use_sliding_window": False,
            "sliding_window": 4096,
        },
    ),
    "gemma": Family(
        biased={"attention_bias": _ATTENTION},
        defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
    ),
    "gemma2": Family(
        biased={"attention_bias": _ATTENTION},
        norms=4,
        slides=_every_other,
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": Family(
        biased={"attention_bias": _ATTENTION},
        norms=4,
        query_norms="head",
        slides=_all_but_every_sixth,
        defaults={
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
        },
    ),
    "phi": Family(
        attention={**_SEPARATE, "out": "self_attn.dense"},
        mlp={"up": "mlp.fc1", "down": "mlp.fc2"},
        biased={"": (*_ATTENTION, *MLP_ROLES)},
        norms=1,
        norm_bias=True,
        head_bias=True,
        fixed={"qk_layernorm": False},
    ),
    "phi3": Family(
        attention={"qkv": "self_attn.qkv_proj", "out": "self_attn.o_proj"},
        mlp={"gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"},
        slides=always,
    ),
    "olmo": Family(biased={"attention_bias": _ATTENTION}, norms=0),
    "olmo2": Family(biased={"attention_bias": _ATTENTION}, query_norms="all"),
    "olmo3": Family(
        biased={"attention_bias": _ATTENTION},
        query_norms="all",
        slides=_all_but_every_fourth,
        defaults={"sliding_window": 4096},
    ),
    "smollm3": Family(
        biased={"attention_bias": _ATTENTION, "mlp_bias": MLP_ROLES},
        slides=_without_rotation,
        defaults={
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
    ),
    "granite": Family(biased={"attention_bias": _ATTENTION, "mlp_bias": MLP_ROLES}),
    "starcoder2": Family(
        mlp=_TWO_LAYERS,
        biased={"use_bias": (*_ATTENTION, *MLP_ROLES)},
        norm_bias=True,
        slides=always,
        defaults={"num_key_value_heads": 2, "use_bias": True, "tie_word_embeddings": True},
    ),
    "gpt2": Family(
        attention={"qkv": "attn.c_attn", "out": "attn.c_proj"},
        mlp=_TWO_LAYERS,
        biased={"": ("qkv", "out", *MLP_ROLES)},
        norm_bias=True,
        has_positions=True,
        defaults={"tie_word_embeddings": True},
        fixed={"add_cross_attention": False},
        keys={
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "num_key_value_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
        prefix="transformer.h",
        embedding="transformer.wte",
    ),
    "gpt_neox": Family(
        attention={"qkv": "attention.query_key_value", "out": "attention.dense"},
        mlp={"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},
        biased={"attention_bias": ("qkv", "out"), "": MLP_ROLES},
        norm_bias=True,
        defaults={"attention_bias": True},
        keys={"num_key_value_heads": "num_attention_heads"},
        prefix="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
    ),
}
