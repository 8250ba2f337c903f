"""Settings of supervised fine-tuning on the chosen answers."""

from typing import Literal

from orpo_ray.config.objectives.base import ObjectiveConfig


class SftConfig(ObjectiveConfig):
    """Likelihood of the chosen answer alone."""

    kind: Literal["sft"] = "sft"
    nll_on: Literal["response", "full"] = "response"

    @property
    def has_likelihood(self) -> bool:
        """Always."""
        return True
