"""How large a base is and which layers it has, from its config.json alone.

`models/size.py` counts the same on torch's meta device. This counts without torch and transformers,
so that a plan takes seconds; a test holds both against each other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from orpo_ray.config.near import near_name
from orpo_ray.errors import CannotTellError, ConfigError
from orpo_ray.planner.families import FAMILIES
from orpo_ray.planner.layers import Layer, Linear, layers_of, norm, read_settings
from orpo_ray.planner.towers import tower_linears, tower_others

ALL_LINEAR = "all-linear"
_WITH_TOWER = {"gemma3": "gemma3_text"}
"""Families with a vision tower, and the family of what reads their text."""
_EXPERTS = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
"""The targets that PEFT takes as experts, or their router, in a base that has them."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a base. All counts are of numbers, not of bytes.

    `experts` is 0 for a dense base. `tower` has the linear layers that no text reaches, `ends` the
    embedding and the head; both names are those of an adapter's targets. `beside` counts what is in
    no layer of the body: embeddings, an untied head, the last norm. `adapts_experts` says whether
    PEFT puts adapters on the experts, `caps_scores` whether attention bends its scores, and
    `caps_logits` whether the head does so (Gemma 2 does both).
    """

    name: str
    family: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    positions: int | None
    tied: bool
    body: tuple[Layer, ...]
    beside: int
    prefix: str
    ends: tuple[Linear, ...]
    tower: tuple[Linear, ...] = ()
    experts: int = 0
    active_experts: int = 0
    adapts_experts: bool = False
    caps_scores: bool = False
    caps_logits: bool = False

    @property
    def layers(self) -> int:
        """The number of layers of the body."""
        return len(self.body)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens each layer looks back; None: all of them."""
        return tuple(layer.window for layer in self.body)

    @property
    def linear(self) -> int:
        """The numbers of the linear layers but the head. These can be quantised."""
        return sum(each.weights for _, each in self._linears() if each.is_module)

    @property
    def others(self) -> int:
        """All numbers that stay as they are: embeddings, head, norms, biases, experts."""
        return self.total - self.linear

    @property
    def in_experts(self) -> int:
        """The numbers of all experts, which transformers holds as parameters of their own."""
        return sum(each.weights for _, each in self._linears() if each.copies > 1)

    @property
    def total(self) -> int:
        """The number of all parameters."""
        layers = sum(layer.others for layer in self.body)
        return self.beside + layers + sum(each.weights for _, each in self._linears())

    @property
    def head(self) -> int:
        """The numbers of the matrix from hidden states to the vocabulary."""
        return self.hidden * self.vocabulary

    @property
    def active(self) -> int:
        """The numbers of the body's matrices that one token is multiplied with."""
        return sum(
            each.inputs * each.outputs * each.active_copies
            for layer in self.body
            for each in layer.linears
        )

    @property
    def normed(self) -> int:
        """The numbers of a token that go through the norms of a layer."""
        family = FAMILIES[_WITH_TOWER.get(self.family, self.family)]
        of_heads = (self.heads + self.kv_heads) * self.head_size if family.query_norms else 0
        return family.norms * self.hidden + of_heads

    @property
    def largest_layer(self) -> int:
        """The numbers of the largest layer of the body."""
        return max(
            layer.others + sum(each.weights for each in layer.linears) for layer in self.body
        )

    @property
    def widths(self) -> int:
        """What an adapter of rank 1 on every linear layer of the body has."""
        return self.lora(1)

    def lora(
        self, rank: int, targets: str | Sequence[str] = ALL_LINEAR, *, dora: bool = False
    ) -> int:
        """The numbers of an adapter.

        Raises ConfigError for a target that is no layer, and CannotTellError for one that PEFT
        takes as experts.
        """
        return sum(
            rank * each.ranks * (each.inputs + each.outputs) + (each.outputs if dora else 0)
            for each in self._targeted(targets)
        )

    def adapted(self, index: int, targets: str | Sequence[str] = ALL_LINEAR) -> list[Linear]:
        """The matrices of one layer that an adapter sits on."""
        linears = [each for each in self.body[index].linears if each.ranks]
        if isinstance(targets, str):
            return linears
        names = {id(each): f"{self.prefix}.{index}.{each.name}" for each in linears}
        return [each for each in linears if any(_is_named(names[id(each)], one) for one in targets)]

    def _targeted(self, targets: str | Sequence[str]) -> list[Linear]:
        """The matrices that an adapter sits on."""
        if isinstance(targets, str):
            return [each for _, each in self._linears() if each.ranks]
        known = [pair for pair in self._linears() if pair[1].is_module and pair[1].ranks]
        known += [(each.name, each) for each in self.ends]
        for target in targets:
            self._check(target, [each for name, each in known if _is_named(name, target)])
        return [each for name, each in known if any(_is_named(name, one) for one in targets)]

    def _check(self, target: str, meant: Sequence[Linear]) -> None:
        """Refuse a target that means no layer, experts, or one end of two that share weights."""
        if self.adapts_experts and target.rpartition(".")[2] in _EXPERTS:
            raise CannotTellError(
                f"adapter.targets: PEFT takes {target} of {self.name} as its experts, and the "
                "planner counts these with all-linear only"
            )
        if not meant:
            names = dict.fromkeys(
                each.name.rpartition(".")[2] for _, each in self._linears() if each.is_module
            )
            near = near_name(target, names)
            hint = f"did you mean {near}?" if near else f"its linear layers are {', '.join(names)}"
            raise ConfigError(f"adapter.targets: {self.name} has no layer {target}; {hint}")
        if self.tied and any(each in self.ends for each in meant):
            ends = " and ".join(each.name for each in self.ends)
            raise ConfigError(
                f"adapter.targets: {target} of {self.name} is tied: {ends} share their weights, "
                "and merging the adapter would change both; remove it"
            )

    def _linears(self) -> Iterator[tuple[str, Linear]]:
        """Every matrix of the body and of a tower, with its full name."""
        for index, layer in enumerate(self.body):
            yield from ((f"{self.prefix}.{index}.{each.name}", each) for each in layer.linears)
        yield from ((each.name, each) for each in self.tower)


def _is_named(name: str, target: str) -> bool:
    """Whether a target of an adapter means a layer: its name, or the end of it."""
    return name == target or name.endswith(f".{target}")


def read_shape(config: Mapping[str, Any], name: str = "the base") -> Shape:
    """The shape that a config.json describes.

    Raises CannotTellError for a family whose layers are not known here.
    """
    written = str(config.get("model_type"))
    kind = _WITH_TOWER.get(written, written)
    if kind not in FAMILIES:
        raise CannotTellError(
            f"model.base: {name} is of the family {written}, whose layers the planner does not "
            f"know; it knows {', '.join([*FAMILIES, *_WITH_TOWER])}"
        )
    if written == kind:
        return _shape(kind, config, name)
    text = _shape(kind, config.get("text_config") or {}, name)
    vision = config.get("vision_config") or {}
    return replace(
        text,
        family=written,
        prefix="model.language_model.layers",
        ends=(replace(text.ends[0], name="model.language_model.embed_tokens"), text.ends[1]),
        tower=tuple(tower_linears(vision)),
        beside=text.beside + tower_others(vision, text.hidden),
    )


def _shape(kind: str, config: Mapping[str, Any], name: str) -> Shape:
    family = FAMILIES[kind]
    settings = read_settings(family, config, name)
    hidden, vocabulary = settings["hidden_size"], settings["vocab_size"]
    positions = settings.get("max_position_embeddings")
    tied = bool(settings.get("tie_word_embeddings", False))
    beside = hidden * vocabulary * (1 if tied else 2) + norm(family, hidden) * bool(family.norms)
    beside += vocabulary * family.head_bias + hidden * (positions or 0) * family.has_positions
    return Shape(
        name=name,
        family=kind,
        hidden=hidden,
        intermediate=settings["intermediate_size"],
        heads=settings["num_attention_heads"],
        kv_heads=settings["num_key_value_heads"],
        head_size=settings["head_dim"],
        vocabulary=vocabulary,
        positions=positions,
        tied=tied,
        body=tuple(layers_of(family, settings)),
        beside=beside,
        prefix=family.prefix,
        ends=(
            Linear(name=family.embedding, inputs=vocabulary, outputs=hidden),
            Linear(name="lm_head", inputs=hidden, outputs=vocabulary),
        ),
        experts=settings[family.experts.number] if family.experts else 0,
        active_experts=settings["num_experts_per_tok"] if family.experts else 0,
        adapts_experts=family.experts is not None and family.experts.adapted,
        caps_scores=settings.get("attn_logit_softcapping") is not None,
        caps_logits=settings.get("final_logit_softcapping") is not None,
    )


def known_shape(name: str) -> Shape | None:
    """The shape of a common base by its hub id, from the table that travels with the package."""
    config = _common().get(name)
    return read_shape(config, name) if config else None


@cache
def _common() -> dict[str, dict[str, Any]]:
    """The config.json of common bases by their hub ids."""
    text = files(__package__).joinpath("shapes.yaml").read_text(encoding="utf-8")
    return {
        name: entry["config"] for entry in yaml.safe_load(text)["bases"] for name in entry["ids"]
    }
