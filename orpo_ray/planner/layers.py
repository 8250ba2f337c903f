"""The layers that a config.json describes, with the size of each matrix."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from orpo_ray.errors import CannotTellError
from orpo_ray.planner.families import MLP_ROLES, Experts, Family, Settings, always, never

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


def read_settings(family: Family, config: Settings, name: str) -> dict[str, Any]:
    """The settings that decide over a base's layers, each with a value.

    Raises CannotTellError if one is missing, or has a value for which the layers are not known.
    """
    found = {**family.defaults, **config}
    found |= {ours: config[own] for ours, own in family.keys.items() if own in config}
    # GPT-2 writes null for an MLP of four times the hidden size.
    if "n_inner" in family.keys.values() and not found.get("intermediate_size"):
        found["intermediate_size"] = 4 * int(found.get("hidden_size", 0))
    for key in _NEEDED:
        size = found.get(key)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            key = family.keys.get(key, key)
            says = f"has no {key}" if size is None else f"says {key}: {size}"
            raise CannotTellError(
                f"model.base: the config.json of {name} {says}, so the planner cannot tell its size"
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
        for role in MLP_ROLES:
            inputs, outputs = sizes[role]
            yield Linear(name=f"mlp.shared_expert.{role}_proj", inputs=inputs, outputs=outputs)
        yield Linear(name="mlp.shared_expert_gate", inputs=hidden, outputs=1)


def _windows(family: Family, settings: Settings) -> list[int | None]:
    """How far back each layer sees."""
    count = settings["num_hidden_layers"]
    window = settings.get("sliding_window") if settings.get("use_sliding_window", True) else None
    if not window or family.slides is never:
        return [None] * count
    kinds = settings.get("layer_types")
    if kinds is not None and family.slides is not always:
        slides = [kind == "sliding_attention" for kind in kinds]
    else:
        slides = [family.slides(settings, index) for index in range(count)]
    return [int(window) if each else None for each in slides]
