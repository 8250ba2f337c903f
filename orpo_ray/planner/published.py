"""The sizes of a base as published measurements had it, and the table of those that have any.

shapes.py counts a base as this project loads it. A stock engine of 2024 had other layers: experts
that are linear layers, and families that transformers no longer has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from orpo_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A linear layer. `reads` says which hidden states it multiplies: those that the query, the
    output, the MLP or its end read. A layer of the base has `copies`, a token passes `active`.
    """

    name: str
    reads: str
    inputs: int
    outputs: int
    copies: int = 1
    active: int = 1

    @property
    def numbers(self) -> int:
        """The numbers of one copy."""
        return self.inputs * self.outputs

    def is_named(self, target: str) -> bool:
        """Whether a target of an adapter means it: its name, or the end of it."""
        return self.name == target or self.name.endswith(f".{target}")


@dataclass(frozen=True, kw_only=True)
class Base:
    """The sizes of a base. `others` counts the numbers in no linear layer of the body: embedding,
    head, norms, biases. `positions` is the most that it was made for, 0 if unknown.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    matrices: tuple[Matrix, ...]
    others: int
    experts: int = 0
    active_experts: int = 1
    positions: int = 0
    ungrouped: bool = False

    @property
    def linear(self) -> int:
        """The numbers of the body's linear layers: what is quantised."""
        return self.layers * sum(each.numbers * each.copies for each in self.matrices)

    @property
    def active(self) -> int:
        """The numbers of the body's linear layers that one token passes."""
        return self.layers * sum(each.numbers * each.active for each in self.matrices)

    @property
    def total(self) -> int:
        """All numbers."""
        return self.linear + self.others

    @property
    def head(self) -> int:
        """The numbers of the matrix from hidden states to the vocabulary."""
        return self.hidden * self.vocabulary

    def targeted(self, targets: Sequence[str]) -> list[Matrix]:
        """The linear layers that an adapter's targets name; ConfigError for one that names none."""
        for target in targets:
            if not any(each.is_named(target) for each in self.matrices):
                names = ", ".join(each.name.rpartition(".")[2] for each in self.matrices)
                raise ConfigError(f"targets: {target} is none of {names}")
        return [each for each in self.matrices if any(each.is_named(name) for name in targets)]

    def lora(self, rank: int, targets: Sequence[str]) -> int:
        """The numbers of an adapter."""
        widths = sum((each.inputs + each.outputs) * each.copies for each in self.targeted(targets))
        return rank * widths * self.layers


def make_base(sizes: dict[str, Any]) -> Base:
    """A base by its sizes: `layers`, `hidden`, `intermediate`, `heads`, `kv_heads`, `vocabulary`
    and `tied`; `head_size`, `experts`, `active_experts`, `positions` and `names` where they differ
    from a dense Llama's.
    """
    hidden, layers = sizes["hidden"], sizes["layers"]
    head_size = sizes.get("head_size") or hidden // sizes["heads"]
    matrices = (_like_qwen if sizes.get("names") == "qwen" else _like_llama)(sizes, head_size)
    embeddings = sizes["vocabulary"] * hidden * (1 if sizes["tied"] else 2)
    return Base(
        layers=layers,
        hidden=hidden,
        intermediate=sizes["intermediate"],
        heads=sizes["heads"],
        kv_heads=sizes["kv_heads"],
        head_size=head_size,
        vocabulary=sizes["vocabulary"],
        matrices=matrices,
        others=embeddings + (2 * layers + 1) * hidden,
        experts=sizes.get("experts", 0),
        active_experts=sizes.get("active_experts", 1),
        positions=sizes.get("positions", 0),
        ungrouped=sizes.get("ungrouped", False),
    )


def find_base(model: str) -> Base | None:
    """The base of a published measurement by its hub id."""
    sizes = _published().get(model)
    return make_base(sizes) if sizes else None


def base_of_size(parameters: float) -> Base:
    """A dense base of so many numbers, of which no sizes are known: the nearest of the table, with
    its linear layers made larger or smaller.
    """
    dense = [make_base(sizes) for sizes in _published().values() if not sizes.get("experts")]
    nearest = min(dense, key=lambda base: abs(base.total / parameters - 1))
    linear = parameters - nearest.others
    factor = max(linear, 0.1 * parameters) / nearest.linear
    matrices = tuple(
        replace(each, outputs=round(each.outputs * factor)) for each in nearest.matrices
    )
    return replace(nearest, matrices=matrices)


@cache
def _published() -> dict[str, dict[str, Any]]:
    text = files(__package__).joinpath("published.yaml").read_text(encoding="utf-8")
    return {name: sizes for sizes in yaml.safe_load(text) for name in sizes["ids"]}


def _like_llama(sizes: dict[str, Any], head_size: int) -> tuple[Matrix, ...]:
    hidden, inner = sizes["hidden"], sizes["intermediate"]
    queries, keys = sizes["heads"] * head_size, sizes["kv_heads"] * head_size
    copies, active = sizes.get("experts") or 1, sizes.get("active_experts", 1)
    many = {"copies": copies, "active": active}
    return (
        Matrix(name="self_attn.q_proj", reads="query", inputs=hidden, outputs=queries),
        Matrix(name="self_attn.k_proj", reads="query", inputs=hidden, outputs=keys),
        Matrix(name="self_attn.v_proj", reads="query", inputs=hidden, outputs=keys),
        Matrix(name="self_attn.o_proj", reads="output", inputs=queries, outputs=hidden),
        Matrix(name="mlp.gate_proj", reads="mlp", inputs=hidden, outputs=inner, **many),
        Matrix(name="mlp.up_proj", reads="mlp", inputs=hidden, outputs=inner, **many),
        Matrix(name="mlp.down_proj", reads="end", inputs=inner, outputs=hidden, **many),
    )


def _like_qwen(sizes: dict[str, Any], head_size: int) -> tuple[Matrix, ...]:
    hidden, inner = sizes["hidden"], sizes["intermediate"]
    all_heads = (sizes["heads"] + 2 * sizes["kv_heads"]) * head_size
    return (
        Matrix(name="attn.c_attn", reads="query", inputs=hidden, outputs=all_heads),
        Matrix(name="attn.c_proj", reads="output", inputs=hidden, outputs=hidden),
        Matrix(name="mlp.w1", reads="mlp", inputs=hidden, outputs=inner),
        Matrix(name="mlp.w2", reads="mlp", inputs=hidden, outputs=inner),
        Matrix(name="mlp.c_proj", reads="end", inputs=inner, outputs=hidden),
    )
