"""Settings of SimPO (arXiv:2405.14734)."""

from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat

from orpo_ray.config.objectives.base import InTrl, ObjectiveConfig
from orpo_ray.config.suited import Suited


class SimpoConfig(ObjectiveConfig):
    """Length-normalised margin with a target; no reference model."""

    kind: Literal["simpo"] = "simpo"
    beta: PositiveFloat = Field(2.0, description="scale of the margin of mean log-probs")
    gamma_beta_ratio: float = Field(
        0.5, ge=0, description="target margin divided by beta, as the paper tabulates it"
    )

    search_space: ClassVar = {
        "objective.beta": Suited(
            {"loguniform": [2.0, 10.0]}, "the recipes of arXiv:2405.14734: 2 to 2.5, and 10"
        ),
        "objective.gamma_beta_ratio": Suited(
            {"uniform": [0.0, 1.0]}, "the recipes of arXiv:2405.14734: 0.1 to 0.8"
        ),
    }

    trl_reward_weight = "beta"

    def in_trl(self) -> InTrl | str:
        """It is a loss type of TRL's CPO, whose default likelihood term is switched off."""
        gamma = self.gamma_beta_ratio * self.beta
        return InTrl(
            "CPO", {"beta": self.beta, "simpo_gamma": gamma, "cpo_alpha": 0.0, "loss_type": "simpo"}
        )
