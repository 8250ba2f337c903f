"""Settings of CPO (arXiv:2401.08417)."""

from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat

from orpo_ray.config.objectives.base import InTrl, ObjectiveConfig
from orpo_ray.config.suited import Suited


class CpoConfig(ObjectiveConfig):
    """DPO without its reference, plus alpha times the likelihood of the chosen answer."""

    kind: Literal["cpo"] = "cpo"
    beta: PositiveFloat = Field(0.1, description="scale of the margin")
    alpha: float = Field(1.0, ge=0, description="weight of the likelihood term")
    nll_on: Literal["response", "full"] = Field(
        "response", description="tokens the likelihood runs over; full: the prompt's too"
    )

    more_preference = "lower objective.alpha"
    trl_reward_weight = "beta"
    trl_rewards = "gains"
    search_space: ClassVar = {
        "objective.beta": Suited(
            {"loguniform": [0.01, 0.1]}, "arXiv:2401.08417: 0.1; beta has the scale of DPO's"
        )
    }

    @property
    def has_likelihood(self) -> bool:
        """Yes, unless its weight is 0."""
        return self.alpha > 0

    def in_trl(self) -> InTrl | str:
        """TRL uses the same names, except for alpha."""
        if self.nll_on != "response":
            return (
                "objective.nll_on: TRL's CPO takes the likelihood over the response; set response"
            )
        return InTrl("CPO", {"beta": self.beta, "cpo_alpha": self.alpha, "loss_type": "sigmoid"})
