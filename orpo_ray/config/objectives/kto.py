"""Settings of KTO (arXiv:2402.01306). TRL's trainer computes it, on single answers."""

from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat

from orpo_ray.config.objectives.base import InTrl, ObjectiveConfig
from orpo_ray.config.suited import Suited


class KtoConfig(ObjectiveConfig):
    """Each answer alone, as wanted or unwanted, compared with a reference and a baseline."""

    kind: Literal["kto"] = "kto"
    beta: PositiveFloat = Field(0.1, description="how near the model stays to its reference")
    desirable_weight: float = Field(1.0, ge=0, description="weight of the chosen answers")
    undesirable_weight: float = Field(1.0, ge=0, description="weight of the rejected answers")

    search_space: ClassVar = {
        "objective.beta": Suited(
            {"loguniform": [0.01, 0.1]},
            "TRL's default 0.1; alignment-handbook, recipes/pref_align_scan, from 0.01",
        )
    }
    needs_reference = True
    only_in_trl = True
    compares_below_adapter = True
    reads_single_answers = True

    def in_trl(self) -> InTrl | str:
        """TRL uses the same names."""
        return InTrl("KTO", self.model_dump(exclude={"kind"}))
