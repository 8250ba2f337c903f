"""Settings of ORPO (arXiv:2403.07691)."""

from typing import ClassVar, Literal

from pydantic import Field

from orpo_ray.config.objectives.base import InTrl, ObjectiveConfig
from orpo_ray.config.suited import Suited


class OrpoConfig(ObjectiveConfig):
    """Likelihood of the chosen answer plus `lambda` times the odds-ratio term; no reference."""

    kind: Literal["orpo"] = "orpo"
    lambda_: float = Field(0.5, ge=0, alias="lambda", description="weight of the odds-ratio term")
    nll_on: Literal["response", "full"] = Field(
        "response", description="tokens the likelihood runs over"
    )

    search_space: ClassVar = {
        "objective.lambda": Suited(
            {"loguniform": [0.1, 2.0]},
            "arXiv:2403.07691 takes 0.1 to 1; twice that for bases without instruction tuning",
        )
    }

    more_preference = "raise objective.lambda"
    trl_reward_weight = "lambda_"

    @property
    def has_likelihood(self) -> bool:
        """Yes, always."""
        return True

    def in_trl(self) -> InTrl | str:
        """TRL calls lambda beta."""
        if self.nll_on != "full":
            return (
                "objective.nll_on: TRL's ORPO takes the likelihood over prompt and response; "
                "set full"
            )
        return InTrl("ORPO", {"beta": self.lambda_})
