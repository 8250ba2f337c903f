"""Settings of KTO (arXiv:2402.01306), computed by TRL's trainer on the answers one by one."""

from typing import Literal

from pydantic import Field, PositiveFloat

from orpo_ray.config.section import Section


class KtoConfig(Section):
    """Each answer by itself, as wanted or unwanted, against a reference and a common baseline."""

    kind: Literal["kto"] = "kto"
    beta: PositiveFloat = 0.1
    desirable_weight: float = Field(1.0, ge=0, description="weight of the chosen answers")
    undesirable_weight: float = Field(1.0, ge=0, description="weight of the rejected answers")
