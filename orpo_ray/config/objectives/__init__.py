"""One config a training objective; `kind` tells them apart."""

from typing import Annotated

from pydantic import Field

from orpo_ray.config.objectives.cpo import CpoConfig
from orpo_ray.config.objectives.dpo import DpoConfig
from orpo_ray.config.objectives.ipo import IpoConfig
from orpo_ray.config.objectives.kto import KtoConfig
from orpo_ray.config.objectives.orpo import OrpoConfig
from orpo_ray.config.objectives.sft import SftConfig
from orpo_ray.config.objectives.simpo import SimpoConfig

AnyObjectiveConfig = OrpoConfig | DpoConfig | IpoConfig | SimpoConfig | CpoConfig | SftConfig | KtoConfig
ObjectiveConfig = Annotated[AnyObjectiveConfig, Field(discriminator="kind")]

__all__ = [
    "AnyObjectiveConfig",
    "CpoConfig",
    "DpoConfig",
    "IpoConfig",
    "KtoConfig",
    "ObjectiveConfig",
    "OrpoConfig",
    "SftConfig",
    "SimpoConfig",
]
