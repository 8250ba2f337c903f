"""Settings of ORPO (arXiv:2403.07691), and of its second stage (arXiv:2502.01237)."""

from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from orpo_ray.config.objectives.base import InTrl, ObjectiveConfig
from orpo_ray.config.suited import Suited


class OrpoConfig(ObjectiveConfig):
    """Likelihood of the chosen answer plus `lambda` times the odds-ratio term; no reference.

    With `nll_weight: 0` it is ORPO-beta (arXiv:2502.01237), a second stage after SFT.
    """

    kind: Literal["orpo"] = "orpo"
    lambda_: float = Field(
        0.5,
        ge=0,
        alias="lambda",
        description="weight of the odds-ratio term; with nll_weight 0 a mere scale of the loss, "
        "which clipping by max_grad_norm alone sees",
    )
    beta: PositiveFloat = Field(
        1.0, description="scale of the log odds ratio inside the sigmoid; 1: the paper"
    )
    nll_weight: float = Field(
        1.0,
        ge=0,
        description="weight of the likelihood term; 0: none, after an SFT stage (arXiv:2502.01237)",
    )
    nll_on: Literal["response", "full"] = Field(
        "response", description="tokens the likelihood runs over"
    )

    search_space: ClassVar = {
        "objective.lambda": Suited(
            {"loguniform": [0.1, 2.0]},
            "arXiv:2403.07691 takes 0.1 to 1; twice that, because the likelihood term of a base "
            "without instruction tuning starts large and hides the preference term",
        )
    }
    special_spaces: ClassVar = {
        ("nll_weight", 0): {
            "objective.beta": Suited(
                {"loguniform": [0.1, 10.0]},
                "arXiv:2502.01237 tunes it from ORPO's own 1; 10 is the highest of SimPO's "
                "recipes (arXiv:2405.14734), whose margin is per token, too",
            )
        }
    }

    more_preference = "raise objective.lambda"
    trl_reward_weight = "lambda_"

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        if not self.nll_weight and not self.lambda_:
            raise ValueError("nll_weight and lambda are 0, so nothing is trained; set one of them")
        return self

    @model_validator(mode="after")
    def _beta_is_not_trls(self) -> Self:
        named = self.model_fields_set
        if self.nll_weight and "beta" in named and "lambda_" not in named:
            raise ValueError(
                f"beta {self.beta:g} scales the log odds ratio here, and what TRL calls beta is "
                f"lambda; set lambda={self.beta:g} in its place, or name lambda beside it"
            )
        return self

    @property
    def has_likelihood(self) -> bool:
        """Yes, unless its weight is 0."""
        return self.nll_weight > 0

    def in_trl(self) -> InTrl | str:
        """TRL calls lambda beta. It weights nothing else."""
        if self.nll_weight != 1 or self.beta != 1:
            return "objective: TRL's ORPO has no nll_weight, and no such beta; set both to 1"
        if self.nll_on != "full":
            return (
                "objective.nll_on: TRL's ORPO takes the likelihood over prompt and response; "
                "set full"
            )
        return InTrl("ORPO", {"beta": self.lambda_})
