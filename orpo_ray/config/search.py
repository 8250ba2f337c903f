"""What a search varies; only the search reads it, a training run carries it along."""

from typing import Any

from pydantic import Field, PositiveInt

from orpo_ray.config.section import Section


class SearchConfig(Section):
    """Dotted fields and the ranges to try."""

    space: dict[str, dict[str, Any]] = Field(default_factory=dict)
    trials: PositiveInt = 16
    metric: str = "eval/accuracy"
