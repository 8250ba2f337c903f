"""Settings of DPO (arXiv:2305.18290), and of variants with another function of the log-ratios."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from orpo_ray.config.objectives.base import InTrl, ObjectiveConfig
from orpo_ray.config.suited import Suited

SMOOTHED = ("sigmoid", "sigmoid-norm", "robust")
"""The losses that have a counterpart with the flipped label, which smoothing weighs in."""
LOSSES_OF_TRL = {
    "sigmoid": "sigmoid",
    "sigmoid_norm": "sigmoid-norm",
    "hinge": "hinge",
    "robust": "robust",
    "apo_zero": "apo-zero",
    "apo_down": "apo-down",
    "nca_pair": "nca",
}
"""The losses, by the names that TRL gives them."""
_BETA_PER_TOKEN = 5.0
"""The usual beta of sigmoid-norm: Tulu 3's (arXiv:2411.15124)."""


class DpoConfig(ObjectiveConfig):
    """Log-ratios over a frozen reference."""

    kind: Literal["dpo"] = "dpo"
    beta: PositiveFloat = Field(
        0.1,
        description="how near the model stays to its reference; 5 by default with sigmoid-norm, "
        "whose log-ratios are per token",
    )
    loss: Literal["sigmoid", "sigmoid-norm", "hinge", "robust", "apo-zero", "apo-down", "nca"] = (
        Field(
            "sigmoid",
            description="sigmoid: the paper; sigmoid-norm: over means per token, Tulu 3's "
            "(arXiv:2411.15124); hinge: SLiC's (arXiv:2305.10425); robust: unbiased under "
            "label_smoothing (arXiv:2403.00409); apo-zero, apo-down: for chosen answers that are "
            "better, or worse, than the model's own (arXiv:2408.06266); nca: each answer alone "
            "against the reference (arXiv:2402.05369)",
        )
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
    special_spaces: ClassVar = {
        ("loss", "sigmoid-norm"): {
            "objective.beta": Suited(
                {"loguniform": [2.0, 10.0]},
                "arXiv:2411.15124 (Tulu 3) takes 5; its margin has the scale of SimPO's, whose "
                "recipes take 2 to 10",
            )
        }
    }

    @model_validator(mode="before")
    @classmethod
    def _usual_beta_suits_the_loss(cls, data: Any) -> Any:
        is_per_token = isinstance(data, Mapping) and data.get("loss") == "sigmoid-norm"
        return {"beta": _BETA_PER_TOKEN, **data} if is_per_token else data

    @model_validator(mode="after")
    def _smoothing_has_a_meaning(self) -> Self:
        if self.label_smoothing and self.loss not in SMOOTHED:
            *names, last = SMOOTHED
            raise ValueError(
                f"label_smoothing: {self.loss} has none; set it to 0, or use loss: "
                f"{', '.join(names)} or {last}"
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
            {
                "beta": self.beta,
                "label_smoothing": self.label_smoothing,
                "loss_type": next(
                    theirs for theirs, ours in LOSSES_OF_TRL.items() if ours == self.loss
                ),
            },
        )
