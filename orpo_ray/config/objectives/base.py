"""What every objective's settings tell the rest of a run, so that nobody asks for its name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from orpo_ray.config.section import Section


@dataclass(frozen=True)
class InTrl:
    """How stock TRL computes an objective: the trainer that is named so, and its settings."""

    trainer: Literal["ORPO", "CPO", "DPO", "KTO"]
    settings: Mapping[str, Any] = field(default_factory=dict)


class ObjectiveConfig(Section):
    """Settings of an objective. `kind` is its name, and that of the files that hold its settings and its loss."""

    kind: str
    search_space: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Ranges that suit it, of its paper and of shipped recipes, by dotted field, as `search.space` writes them."""
    only_in_trl: ClassVar[bool] = False
    """Whether our own engine has no such loss."""
    compares_below_adapter: ClassVar[bool] = False
    """Whether its reference is the model below the adapter that is trained."""

    @property
    def has_likelihood(self) -> bool:
        """Whether the loss has a likelihood term, which holds the text together at higher learning rates."""
        return False

    def in_trl(self) -> InTrl | str:
        """How TRL computes it as it is set; or why it does not, and what to set instead."""
        return f"objective.kind: the trainers that TRL brings to pairs have no {self.kind}; use another objective"
