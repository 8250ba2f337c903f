"""Settings of IPO (arXiv:2310.12036)."""

from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat

from orpo_ray.config.objectives.base import InTrl, ObjectiveConfig
from orpo_ray.config.suited import Suited


class IpoConfig(ObjectiveConfig):
    """Squared distance of the log-ratio margin from 1 / (2 beta); beta is the paper's tau."""

    kind: Literal["ipo"] = "ipo"
    beta: PositiveFloat = Field(
        0.1, description="the paper's tau: the margin's target is 1/(2 beta)"
    )
    log_probs: Literal["sum", "token-mean"] = Field(
        "sum", description="sum: the paper; token-mean: TRL's choice"
    )

    needs_reference = True
    trl_reward_weight = "beta"
    trl_rewards = "gains"
    search_space: ClassVar = {
        "objective.beta": Suited(
            {"loguniform": [0.01, 1.0]}, "alignment-handbook, recipes/pref_align_scan: 0.01 to 0.9"
        )
    }

    def in_trl(self) -> InTrl | str:
        """It is a loss type of TRL's DPO."""
        if self.log_probs != "token-mean":
            return "objective.log_probs: TRL's IPO takes means over tokens; set token-mean"
        return InTrl("DPO", {"beta": self.beta, "loss_type": "ipo"})
