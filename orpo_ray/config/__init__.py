"""What a run is: typed, frozen settings, and the YAML that they come from.

This room imports neither torch nor Ray.
"""

from orpo_ray.config.build import build, dump
from orpo_ray.config.data import Columns, DataConfig, Source
from orpo_ray.config.load import load_config, load_resolved
from orpo_ray.config.model import AdapterConfig, ModelConfig
from orpo_ray.config.run import RunConfig
from orpo_ray.config.search import SearchConfig
from orpo_ray.config.stages import stage_configs
from orpo_ray.config.training import ScaleConfig, TrainingConfig, every_to_steps, warmup_steps

__all__ = [
    "AdapterConfig",
    "Columns",
    "DataConfig",
    "ModelConfig",
    "RunConfig",
    "ScaleConfig",
    "SearchConfig",
    "Source",
    "TrainingConfig",
    "build",
    "dump",
    "every_to_steps",
    "load_config",
    "load_resolved",
    "stage_configs",
    "warmup_steps",
]
