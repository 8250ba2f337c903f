"""Settings of DPO (arXiv:2305.18290)."""

from typing import Literal

from pydantic import Field, PositiveFloat

from orpo_ray.config.section import Section


class DpoConfig(Section):
    """Log-ratio margin over a frozen reference."""

    kind: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed share of wrong labels")
    nll_weight: float = Field(0.0, ge=0, description="weight of an added likelihood term on the chosen answer")
    nll_on: Literal["response", "full"] = "response"
