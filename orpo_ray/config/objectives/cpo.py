"""Settings of CPO (arXiv:2401.08417)."""

from typing import Literal

from pydantic import Field, PositiveFloat

from orpo_ray.config.section import Section


class CpoConfig(Section):
    """DPO without its reference, plus alpha times the likelihood of the chosen answer."""

    kind: Literal["cpo"] = "cpo"
    beta: PositiveFloat = 0.1
    alpha: float = Field(1.0, ge=0, description="weight of the likelihood term")
    nll_on: Literal["response", "full"] = "response"
