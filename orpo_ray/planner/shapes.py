"""Which layers a base has and how large they are, from its config.json alone.

models/size.py counts the same on torch's meta device. This counts without torch and transformers,
so that a plan takes seconds; a test holds both against each other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from orpo_ray.config.near import near_name
from orpo_ray.errors import ConfigError

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer, and how often the model has it. The name is that inside of a layer."""

    name: str
    inputs: int
    outputs: int
    copies: int = 1

    @property
    def weights(self) -> int:
        """The numbers of one copy's matrix; its bias is not among them."""
        return self.inputs * self.outputs

    def is_named(self, target: str) -> bool:
        """Whether a target of an adapter means this layer: its name, or the end of it."""
        return self.name == target or self.name.endswith(f".{target}")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a base.

    `windows` has an entry a layer: how many tokens back it sees, or None for all of them.
    `linears` are the linear layers of the body, `others` all numbers that are no matrix of theirs.
    `experts` is 0 for a dense base; `expert` counts the numbers of one expert of one layer.
    """

    name: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    windows: tuple[int | None, ...]
    linears: tuple[Linear, ...]
    others: int
    experts: int = 0
    active_experts: int = 0
    expert: int = 0

    @property
    def linear(self) -> int:
        """The numbers of the body's linear layers, which can be quantised."""
        return sum(each.weights * each.copies for each in self.linears)

    @property
    def total(self) -> int:
        """The number of all parameters."""
        return self.linear + self.others

    @property
    def head(self) -> int:
        """The numbers of the matrix from hidden states to the vocabulary."""
        return self.hidden * self.vocabulary

    @property
    def widths(self) -> int:
        """The sum of the input and output sizes of the body's linear layers."""
        return sum((each.inputs + each.outputs) * each.copies for each in self.linears)

    @property
    def active(self) -> int:
        """The numbers of the body's matrices that one token is multiplied with."""
        return self.linear

    def lora(self, rank: int, targets: str | Sequence[str] = ALL_LINEAR) -> int:
        """The numbers of a LoRA adapter. Raises ConfigError for a target that is no layer."""
        return rank * sum(
            (each.inputs + each.outputs) * each.copies for each in self.targeted(targets)
        )

    def targeted(self, targets: str | Sequence[str]) -> tuple[Linear, ...]:
        """The linear layers that an adapter's targets name."""
        if targets == ALL_LINEAR:
            return self.linears
        for target in targets:
            if not any(each.is_named(target) for each in self.linears):
                self._refuse(target)
        return tuple(
            each for each in self.linears if any(each.is_named(target) for target in targets)
        )

    def _refuse(self, target: str) -> None:
        known = [each.name.rpartition(".")[2] for each in self.linears]
        near = near_name(target, known)
        hint = f"did you mean {near}?" if near else f"its linear layers are {', '.join(known)}"
        raise ConfigError(f"adapter.targets: {self.name} has no layer {target}; {hint}")


def read_shape(config: Mapping[str, Any], name: str = "the base") -> Shape:
    """The shape that a config.json describes.

    Raises ConfigError for a family whose layers are not known here.
    """
    family = str(config.get("model_type"))
    if family not in _FAMILIES:
        raise ConfigError(f"model.base: the planner does not know the layers of {family} ({name})")
    return _FAMILIES[family](config, name)


def known_shape(name: str) -> Shape | None:
    """The shape of a common base by its hub id, from the table that travels with the package."""
    config = _common().get(name)
    return read_shape(config, name) if config else None


@cache
def _common() -> dict[str, dict[str, Any]]:
    text = files(__package__).joinpath("shapes.yaml").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return table


def _like_llama(config: Mapping[str, Any], name: str) -> Shape:
    """Attention with grouped keys, and an MLP with a gate; RMS norms before both."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or hidden // heads
    layers, inner = config["num_hidden_layers"], config["intermediate_size"]
    family, vocabulary = config["model_type"], config["vocab_size"]
    tied = config.get("tie_word_embeddings", False)
    sizes = {
        "self_attn.q_proj": (hidden, heads * size),
        "self_attn.k_proj": (hidden, kv_heads * size),
        "self_attn.v_proj": (hidden, kv_heads * size),
        "self_attn.o_proj": (heads * size, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    biased = ["q_proj", "k_proj", "v_proj"] if family == "qwen2" else []
    biased += ["q_proj", "k_proj", "v_proj", "o_proj"] if config.get("attention_bias") else []
    biased += ["gate_proj", "up_proj", "down_proj"] if config.get("mlp_bias") else []
    biases = sum(out for part, (_, out) in sizes.items() if part.rpartition(".")[2] in biased)
    norms = 2 * hidden + (2 * size if family == "qwen3" else 0)
    return Shape(
        name=name,
        family=family,
        layers=layers,
        hidden=hidden,
        intermediate=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        vocabulary=vocabulary,
        tied=tied,
        windows=(config.get("sliding_window"),) * layers,
        linears=tuple(
            Linear(name=part, inputs=inputs, outputs=outputs, copies=layers)
            for part, (inputs, outputs) in sizes.items()
        ),
        others=vocabulary * hidden * (1 if tied else 2) + layers * (norms + biases) + hidden,
    )


_FAMILIES: dict[str, Callable[[Mapping[str, Any], str], Shape]] = {
    "llama": _like_llama,
    "mistral": _like_llama,
    "qwen2": _like_llama,
    "qwen3": _like_llama,
}
