"""A whole run: the sections together and the rules that span them."""

import re
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ModelWrapValidatorHandler, field_validator, model_validator

from orpo_ray.config.compare import CompareConfig
from orpo_ray.config.data import DataConfig
from orpo_ray.config.engine import refuse_engine, refuse_turns
from orpo_ray.config.keys import all_keys
from orpo_ray.config.model import AdapterConfig, ModelConfig, refuse_start
from orpo_ray.config.near import near_name
from orpo_ray.config.objectives import AnyObjective
from orpo_ray.config.objectives.orpo import OrpoConfig
from orpo_ray.config.optimizers import refuse_optimizer
from orpo_ray.config.search import SearchConfig, refuse_field
from orpo_ray.config.section import Section
from orpo_ray.config.storage import checked_place, inside, is_url, local_path
from orpo_ray.config.suited import default_rate
from orpo_ray.config.training import ScaleConfig, TrainingConfig

_FOLDERS_OF_THE_STORAGE = ("artifacts", "references")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_NOT_OF_A_STAGE = ("name", "storage", "search", "stages", "compare")


class RunConfig(Section):
    """Everything that decides what a run computes.

    It is frozen, with all defaults. What is `auto` or null is decided when the run starts.
    """

    name: str = Field(description="folder of the run inside the storage; a/b lies inside a")
    storage: str = Field(
        "runs",
        min_length=1,
        description="folder that holds runs and prepared data, or s3://bucket/folder",
    )
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    objective: AnyObjective = OrpoConfig()
    training: TrainingConfig = TrainingConfig()
    scale: ScaleConfig = ScaleConfig()
    stages: tuple[dict[str, Any], ...] = Field(
        (),
        description="settings of each stage that differ from those above; each stage starts from "
        "the result of the one before",
    )
    search: SearchConfig | None = Field(None, description="only read by `tune`")
    compare: CompareConfig | None = Field(None, description="only read by `compare` and `plan`")

    @field_validator("name")
    @classmethod
    def _name_is_a_free_folder(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(
                "must be letters, digits and . _ - (and / between folders) and begin with a letter "
                f"or digit, not {name!r}"
            )
        if (folder := name.partition("/")[0]) in _FOLDERS_OF_THE_STORAGE:
            raise ValueError(
                f"{folder} is a folder that all runs of a storage share; choose another name"
            )
        return name

    @field_validator("storage")
    @classmethod
    def _storage_is_a_folder_or_in_a_bucket(cls, storage: str) -> str:
        return checked_place(storage)

    @model_validator(mode="before")
    @classmethod
    def _objective_is_orpo_unless_named(cls, data: Any) -> Any:
        """`objective.lambda=0.3` alone is enough, because ORPO is the default."""
        objective = data.get("objective") if isinstance(data, dict) else None
        if isinstance(objective, dict) and "kind" not in objective:
            return {**data, "objective": {"kind": "orpo", **objective}}
        return data

    @model_validator(mode="wrap")
    @classmethod
    def _rate_suits_the_objective(cls, data: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        """A run without a learning rate gets a usual one; with stages, each stage gets its own."""
        run = read(data)
        if run.stages or run.training.learning_rate is not None:
            return run
        training = run.training.model_copy(update={"learning_rate": run.usual_rate})
        return run.model_copy(update={"training": training})

    @property
    def usual_rate(self) -> float:
        """The learning rate of a run like this one that names none."""
        return default_rate(self.adapter.kind, self.objective.has_likelihood)

    @property
    def run_dir(self) -> Path:
        """Where the run's files live on this server."""
        return self.storage_dir / self.name

    @property
    def storage_dir(self) -> Path:
        """The storage as an absolute folder of this server; for a bucket, its local copy."""
        return local_path(self.storage, "storage").resolve()

    @property
    def place(self) -> str:
        """Where the run's files are, in words that other servers understand: a URL or a path."""
        return inside(self.storage if is_url(self.storage) else str(self.storage_dir), self.name)

    @model_validator(mode="after")
    def _full_training_needs_full_weights(self) -> Self:
        if self.adapter.kind == "none" and self.model.quantization != "none":
            raise ValueError(
                "adapter.kind=none trains the base's own weights, but model.quantization="
                f"{self.model.quantization} freezes them; set model.quantization=none, or "
                "adapter.kind=lora"
            )
        return self

    @model_validator(mode="after")
    def _adapter_starts_on_the_base(self) -> Self:
        if problem := refuse_start(self.adapter, self.model):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _optimizer_fits(self) -> Self:
        if problem := refuse_optimizer(self.training, self.adapter, self.scale):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _trl_metrics_are_at_hand(self) -> Self:
        if self.training.trl_metric_names and self.objective.only_in_trl:
            raise ValueError(
                f"training.trl_metric_names: the metrics of {self.objective.kind} stay inside of "
                "TRL's trainer; set it to false"
            )
        return self

    @model_validator(mode="after")
    def _engine_computes_the_objective(self) -> Self:
        if problem := refuse_engine(self.objective, self.training, self.adapter):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _turns_can_be_trained(self) -> Self:
        if problem := refuse_turns(self.data, self.objective, self.training):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _stages_change_sections(self) -> Self:
        known = [name for name in type(self).model_fields if name not in _NOT_OF_A_STAGE]
        for number, stage in enumerate(self.stages):
            for section, content in stage.items():
                if section not in known:
                    near = near_name(str(section), known)
                    hint = f"did you mean {near}?" if near else f"known: {', '.join(known)}"
                    raise ValueError(f"stages.{number}: {section} is no section of a stage; {hint}")
                if not isinstance(content, dict):
                    raise ValueError(
                        f"stages.{number}.{section}: must be a section, not {content!r}"
                    )
        return self

    @model_validator(mode="after")
    def _search_names_fields(self) -> Self:
        fields = self.search.space if self.search else {}
        stages = {name.split(".")[1] for name in fields if name.startswith("stages.")}
        for name in fields:
            if problem := self._refuse_search_of(name):
                raise ValueError(f"search.space: {problem}")
        if len(stages) > 1:
            raise ValueError(
                f"search.space: fields of stages {' and '.join(sorted(stages))}; search one stage "
                "at a time"
            )
        return self

    def _refuse_search_of(self, field: str) -> str | None:
        """Why a field cannot be searched in this run, or None if it can."""
        known = [
            key for key in all_keys(type(self)) if key.partition(".")[0] not in _NOT_OF_A_STAGE
        ]
        if not field.startswith("stages."):
            if self.stages and refuse_field(field, known) is None:
                return f"{field}: the run has stages; name the stage, such as stages.0.{field}"
            return refuse_field(field, known)
        if not self.stages:
            return f"{field}: the run has no stages"
        _, number, *rest = field.split(".")
        if not number.isdecimal() or int(number) >= len(self.stages):
            return (
                f"{field}: the run has {len(self.stages)} stages, named stages.0 to "
                f"stages.{len(self.stages) - 1}"
            )
        if not rest:
            return f"{field}: name a field of the stage, such as {field}.training.learning_rate"
        return refuse_field(".".join(rest), known, f"stages.{number}.")
