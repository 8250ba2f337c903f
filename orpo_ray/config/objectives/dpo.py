"""Settings of DPO (arXiv:2305.18290), and of variants with another function of the margin."""

from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from orpo_ray.config.objectives.base import InTrl, ObjectiveConfig
from orpo_ray.config.suited import Suited


class DpoConfig(ObjectiveConfig):
    """Log-ratio margin over a frozen reference."""

    kind: Literal["dpo"] = "dpo"
    beta: PositiveFloat = Field(0.1, description="how near the model stays to its reference")
    loss: Literal["sigmoid", "hinge", "robust"] = Field(
        "sigmoid",
        description="sigmoid: the paper; hinge: SLiC's (arXiv:2305.10425); robust: unbiased "
        "under label_smoothing (arXiv:2403.00409)",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed share of wrong labels")
    nll_weight: float = Field(
        0.0, ge=0, description="weight of an added likelihood term on the chosen answer"
    )
    nll_on: Literal["response", "full"] = Field(
        "response", description="tokens the likelihood runs over; full: the prompt's too"
    )

    needs_reference = True
    more_preference = "lower objective.nll_weight"
    trl_reward_weight = "beta"
    trl_rewards = "gains"
    search_space: ClassVar = {
        "objective.beta": Suited(
            {"loguniform": [0.01, 0.1]},
            "arXiv:2305.18290 takes 0.1; the alignment-handbook's recipes for Zephyr take 0.01 "
            "and 0.05",
        )
    }

    @model_validator(mode="after")
    def _hinge_is_not_smoothed(self) -> Self:
        if self.loss == "hinge" and self.label_smoothing:
            raise ValueError(
                "label_smoothing: hinge has none; set it to 0, or use loss: sigmoid or robust"
            )
        return self

    @property
    def has_likelihood(self) -> bool:
        """Yes, if its weight is above 0."""
        return self.nll_weight > 0

    def in_trl(self) -> InTrl | str:
        """TRL's DPO smooths labels only for `robust`. Its likelihood term is not used here."""
        if self.nll_weight or (self.label_smoothing and self.loss != "robust"):
            return (
                "objective: with training.engine: trl, dpo takes no nll_weight, and takes "
                "label_smoothing with loss: robust only; set them to 0"
            )
        return InTrl(
            "DPO",
            {"beta": self.beta, "label_smoothing": self.label_smoothing, "loss_type": self.loss},
        )
