"""Settings of ORPO (arXiv:2403.07691)."""

from typing import Literal

from pydantic import Field

from orpo_ray.config.section import Section


class OrpoConfig(Section):
    """Likelihood of the chosen answer plus `lambda` times the odds-ratio term; no reference model."""

    kind: Literal["orpo"] = "orpo"
    lambda_: float = Field(0.1, ge=0, alias="lambda", description="weight of the odds-ratio term")
    nll_on: Literal["response", "full"] = Field("response", description="tokens the likelihood runs over")
