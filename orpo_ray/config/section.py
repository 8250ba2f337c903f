"""The base of every config section: frozen, closed to unknown keys."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A part of a config. Frozen, because a run never changes what the user asked for."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _yes_is_not_one(cls, data: Any) -> Any:
        """Pydantic would read `learning_rate: yes` as 1."""
        for name, field in cls.model_fields.items():
            value = data.get(field.alias or name) if isinstance(data, dict) else None
            if isinstance(value, bool) and bool not in (field.annotation, *get_args(field.annotation)):
                raise ValueError(f"{field.alias or name} must be a number or text, not {value}")
        return data
