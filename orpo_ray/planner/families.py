"""Which layers the bases of each family have, by what transformers builds from a config.json.

A test builds every family on torch's meta device and compares.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from orpo_ray.errors import CannotTellError

Settings = Mapping[str, Any]

_QKV = ("query", "key", "value")
_ATTENTION = (*_QKV, "out")
_MLP = ("gate", "up", "down")
_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A matrix that hidden states are multiplied with.

    `copies` counts it, `active_copies` those that one token of text passes: experts share one
    parameter, and no text passes a vision tower. `is_module` says whether it is a linear layer of
    its own: experts and their router are none, so they are not quantised. `ranks` is how many times
    an adapter's rank its LoRA matrices have; 0 if PEFT puts no adapter on it.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    copies: int = 1
    active_copies: int = 1
    is_module: bool = True
    ranks: int = 1

    @property
    def weights(self) -> int:
        """The numbers of its matrix, or of all experts' matrices."""
        return self.inputs * self.outputs * self.copies


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of the body: its matrices, the numbers beside them, and how far back it sees.

    `window` is None if the layer sees all tokens before.
    """

    linears: tuple[Linear, ...]
    others: int
    window: int | None


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The names of the settings of a mixture of experts, and whether PEFT adapts its experts."""

    number: str
    size: str
    shared_size: str = ""
    adapted: bool = True


def _never(settings: Settings, index: int) -> bool:
    return False


def _always(settings: Settings, index: int) -> bool:
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
    slides: Callable[[Settings, int], bool] = _never
    defaults: Settings = field(default_factory=dict)
    fixed: Settings = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    prefix: str = "model.layers"
    embedding: str = "model.embed_tokens"


_WINDOW_ON_REQUEST = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {
    "llama": Family(biased={"attention_bias": _ATTENTION, "mlp_bias": _MLP}),
    "mistral": Family(slides=_always, defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "mixtral": Family(
        experts=Experts(number="num_local_experts", size="intermediate_size"),
        slides=_always,
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
        slides=_always,
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
        biased={"": (*_ATTENTION, *_MLP)},
        norms=1,
        norm_bias=True,
        head_bias=True,
        fixed={"qk_layernorm": False},
    ),
    "phi3": Family(
        attention={"qkv": "self_attn.qkv_proj", "out": "self_attn.o_proj"},
        mlp={"gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"},
        slides=_always,
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
        biased={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
        slides=_without_rotation,
        defaults={
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
    ),
    "granite": Family(biased={"attention_bias": _ATTENTION, "mlp_bias": _MLP}),
    "starcoder2": Family(
        mlp=_TWO_LAYERS,
        biased={"use_bias": (*_ATTENTION, *_MLP)},
        norm_bias=True,
        slides=_always,
        defaults={"num_key_value_heads": 2, "use_bias": True, "tie_word_embeddings": True},
    ),
    "gpt2": Family(
        attention={"qkv": "attn.c_attn", "out": "attn.c_proj"},
        mlp=_TWO_LAYERS,
        biased={"": ("qkv", "out", *_MLP)},
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
        biased={"attention_bias": ("qkv", "out"), "": _MLP},
        norm_bias=True,
        defaults={"attention_bias": True},
        keys={"num_key_value_heads": "num_attention_heads"},
        prefix="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
    ),
}


def read_settings(family: Family, config: Settings, name: str) -> dict[str, Any]:
    """The settings that decide over a base's layers, each with a value.

    Raises CannotTellError if one is missing, or has a value for which the layers are not known.
    """
    found = {**family.defaults, **config}
    found |= {ours: config[own] for ours, own in family.keys.items() if own in config}
    if "n_inner" in family.keys.values() and not found.get("intermediate_size"):
        found["intermediate_size"] = 4 * int(found.get("hidden_size", 0))
    for key in _NEEDED:
        if not found.get(key):
            raise CannotTellError(
                f"model.base: the config.json of {name} has no {family.keys.get(key, key)}, so "
                "the planner cannot tell its size"
            )
    for key, value in family.fixed.items():
        if found.get(key, value) != value:
            raise CannotTellError(
                f"model.base: {name} has {key}: {found[key]}, and the planner does not know its "
                "layers then"
            )
    found["num_key_value_heads"] = found.get("num_key_value_heads") or found["num_attention_heads"]
    found["head_dim"] = (
        found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
    )
    return found


def layers_of(family: Family, settings: Settings) -> Iterator[Layer]:
    """The layers of the body, the first one first."""
    sparse = [_is_sparse(family, settings, i) for i in range(settings["num_hidden_layers"])]
    windows = _windows(family, settings)
    kinds = {kind: tuple(_linears(family, settings, kind)) for kind in set(sparse)}
    for kind, window in zip(sparse, windows, strict=True):
        linears = kinds[kind]
        biases = sum(each.outputs for each in linears if each.bias)
        yield Layer(linears=linears, others=biases + _norms(family, settings), window=window)


def norm(family: Family, width: int) -> int:
    """The numbers of one norm."""
    return width * 2 if family.norm_bias else width


def _norms(family: Family, settings: Settings) -> int:
    """The numbers of all norms of a layer."""
    hidden, head = int(settings["hidden_size"]), int(settings["head_dim"])
    heads = int(settings["num_attention_heads"]) + int(settings["num_key_value_heads"])
    spans = {"": 0, "head": 2 * head, "all": heads * head}
    return family.norms * norm(family, hidden) + spans[family.query_norms]


def _is_sparse(family: Family, settings: Settings, index: int) -> bool:
    """Whether a layer has experts in place of one MLP."""
    if family.experts is None or settings[family.experts.number] == 0:
        return False
    step = settings.get("decoder_sparse_step", 1)
    return index not in (settings.get("mlp_only_layers") or ()) and (index + 1) % step == 0


def _linears(family: Family, settings: Settings, sparse: bool) -> Iterator[Linear]:
    """The matrices of a layer with experts, or of one without."""
    biased = {
        role
        for setting, roles in family.biased.items()
        if not setting or settings.get(setting)
        for role in roles
    }
    roles = {**family.attention} if sparse else {**family.attention, **family.mlp}
    sizes = _sizes(settings, settings["intermediate_size"])
    # PEFT takes the names of an MLP as those of experts, in layers without experts, too.
    adapts_experts = family.experts is not None and family.experts.adapted
    for role, name in roles.items():
        inputs, outputs = sizes[role]
        ranks = 0 if adapts_experts and role in family.mlp else 1
        yield Linear(name=name, inputs=inputs, outputs=outputs, bias=role in biased, ranks=ranks)
    if sparse and family.experts is not None:
        yield from _expert_matrices(family.experts, settings)


def _sizes(settings: Settings, inner: int) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a linear layer by its role."""
    hidden, head = settings["hidden_size"], settings["head_dim"]
    queries, keys = head * settings["num_attention_heads"], head * settings["num_key_value_heads"]
    return {
        "query": (hidden, queries),
        "key": (hidden, keys),
        "value": (hidden, keys),
        "qkv": (hidden, queries + 2 * keys),
        "out": (queries, hidden),
        "gate": (hidden, inner),
        "up": (hidden, inner),
        "gate_up": (hidden, 2 * inner),
        "down": (inner, hidden),
    }


def _expert_matrices(experts: Experts, settings: Settings) -> Iterator[Linear]:
    """The router, the experts, which are one parameter a role, and what all tokens share."""
    number, hidden = settings[experts.number], settings["hidden_size"]
    yield Linear(
        name="mlp.gate",
        inputs=hidden,
        outputs=number,
        is_module=False,
        ranks=int(experts.adapted),
    )
    sizes = _sizes(settings, settings[experts.size])
    # PEFT gives the joined matrix of gate and up twice the rank: once for each.
    for role, name, ranks in (("gate_up", "gate_up_proj", 2), ("down", "down_proj", 1)):
        inputs, outputs = sizes[role]
        yield Linear(
            name=f"mlp.experts.{name}",
            inputs=inputs,
            outputs=outputs,
            copies=number,
            active_copies=settings["num_experts_per_tok"],
            is_module=False,
            ranks=ranks * number if experts.adapted else 0,
        )
    if experts.shared_size:
        sizes = _sizes(settings, settings[experts.shared_size])
        for role in _MLP:
            inputs, outputs = sizes[role]
            yield Linear(name=f"mlp.shared_expert.{role}_proj", inputs=inputs, outputs=outputs)
        yield Linear(name="mlp.shared_expert_gate", inputs=hidden, outputs=1)


def _windows(family: Family, settings: Settings) -> list[int | None]:
    """How far back each layer sees."""
    count = settings["num_hidden_layers"]
    window = settings.get("sliding_window") if settings.get("use_sliding_window", True) else None
    if not window or family.slides is _never:
        return [None] * count
    kinds = settings.get("layer_types")
    if kinds is not None and family.slides is not _always:
        slides = [kind == "sliding_attention" for kind in kinds]
    else:
        slides = [family.slides(settings, index) for index in range(count)]
    return [int(window) if each else None for each in slides]
