"""Settings of SimPO (arXiv:2405.14734)."""

from typing import Literal

from pydantic import Field, PositiveFloat

from orpo_ray.config.section import Section


class SimpoConfig(Section):
    """Length-normalised margin with a target; no reference model."""

    kind: Literal["simpo"] = "simpo"
    beta: PositiveFloat = 2.0
    gamma_beta_ratio: float = Field(0.5, ge=0, description="target margin divided by beta, as the paper tabulates it")
