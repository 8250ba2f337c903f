"""A whole run: the sections together and the rules that span them."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from orpo_ray.config.data import DataConfig
from orpo_ray.config.model import AdapterConfig, ModelConfig
from orpo_ray.config.objectives import ObjectiveConfig, OrpoConfig
from orpo_ray.config.search import SearchConfig
from orpo_ray.config.section import Section
from orpo_ray.config.training import DeepSpeedConfig, ScaleConfig, TrainingConfig
from orpo_ray.errors import ConfigError

_FOLDERS_OF_THE_STORAGE = ("artifacts", "references")


class RunConfig(Section):
    """Everything that decides what a run computes. Frozen and total: later stages fill in no defaults."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder of the run inside the storage")
    storage: str = Field("runs", min_length=1, description="local folder that holds runs and prepared data")
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    objective: ObjectiveConfig = OrpoConfig()
    training: TrainingConfig = TrainingConfig()
    scale: ScaleConfig = ScaleConfig()
    search: SearchConfig | None = None

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str) -> str:
        if name in _FOLDERS_OF_THE_STORAGE:
            raise ValueError(f"{name} is a folder that all runs of a storage share; choose another name")
        return name

    @model_validator(mode="before")
    @classmethod
    def _objective_is_orpo_unless_named(cls, data: Any) -> Any:
        """So that `objective.lambda=0.3` alone means what it says."""
        objective = data.get("objective") if isinstance(data, dict) else None
        if isinstance(objective, dict) and "kind" not in objective:
            return {**data, "objective": {"kind": "orpo", **objective}}
        return data

    @property
    def run_dir(self) -> Path:
        """Where the run's files live."""
        return self.storage_dir / self.name

    @property
    def storage_dir(self) -> Path:
        """The storage as an absolute local folder. Raises ConfigError where it is none."""
        if "://" in self.storage:
            raise ConfigError(f"storage: {self.storage} is a URL; this version writes to a local folder only")
        return Path(self.storage).expanduser().resolve()

    @model_validator(mode="after")
    def _full_training_needs_full_weights(self) -> Self:
        if self.adapter.kind == "none" and self.model.quantization != "none":
            raise ValueError(
                f"adapter.kind: none trains the base's own weights, which quantization: {self.model.quantization} "
                "freezes; set model.quantization=none, or adapter.kind=lora"
            )
        return self

    @model_validator(mode="after")
    def _sharded_state_is_not_8_bit(self) -> Self:
        deepspeed, optimizer = self.scale.deepspeed, self.training.optimizer
        if isinstance(deepspeed, DeepSpeedConfig) and deepspeed.stage > 0 and optimizer != "adamw":
            raise ValueError(
                f"training.optimizer: {optimizer} keeps its state in 8-bit blocks, which ZeRO stage {deepspeed.stage} "
                "would cut through; set scale.deepspeed=none, or training.optimizer=adamw"
            )
        return self
