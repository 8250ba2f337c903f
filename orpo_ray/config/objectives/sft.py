"""Settings of supervised fine-tuning on the chosen answers."""

from typing import Literal

from pydantic import Field

from orpo_ray.config.objectives.base import ObjectiveConfig


class SftConfig(ObjectiveConfig):
    """Likelihood of the chosen answer alone."""

    kind: Literal["sft"] = "sft"
    nll_on: Literal["response", "full"] = Field(
        "response", description="tokens the likelihood runs over; full: the prompt's too"
    )

    needs_rejected = False

    @property
    def has_likelihood(self) -> bool:
        """Yes, always."""
        return True
