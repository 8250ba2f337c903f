"""The base of every config section: frozen, closed to unknown keys."""

from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """A part of a config. Frozen, because a run never changes what the user asked for."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        populate_by_name=True,
        validate_default=True,
    )

    @classmethod
    def _fields_by_key(cls) -> dict[str, FieldInfo]:
        return {field.alias or name: field for name, field in cls.model_fields.items()}

    @model_validator(mode="before")
    @classmethod
    def _yes_is_not_one(cls, data: Any) -> Any:
        """Make yes and no texts, so that numbers refuse them: pydantic reads `yes` as 1."""
        if not isinstance(data, Mapping):
            return data
        fields = cls._fields_by_key()
        texts = {
            key: str(value)
            for key, value in data.items()
            if isinstance(value, bool) and key in fields and _reads_yes_as_one(fields[key])
        }
        return {**data, **texts}

    @model_validator(mode="before")
    @classmethod
    def _one_item_is_a_list_of_one(cls, data: Any) -> Any:
        """`trackers: wandb` and `train: pairs.jsonl` need no brackets."""
        if not isinstance(data, Mapping):
            return data
        fields = cls._fields_by_key()
        return {
            key: [value] if key in fields and _is_item(fields[key], value) else value
            for key, value in data.items()
        }


def _options(field: FieldInfo) -> tuple[Any, ...]:
    """The types of a field: those of a union, or the only one."""
    is_union = get_origin(field.annotation) in (Union, UnionType)
    return get_args(field.annotation) if is_union else (field.annotation,)


def _reads_yes_as_one(field: FieldInfo) -> bool:
    """Whether a field holds numbers, but no yes or no."""
    kinds = [
        get_args(option)[0] if get_origin(option) is Annotated else option
        for option in _options(field)
    ]
    return bool not in kinds and (int in kinds or float in kinds)


def _is_item(field: FieldInfo, value: Any) -> bool:
    """Whether a field holds a list, and the value can be an item of one."""
    if not isinstance(value, str | Mapping):
        return False
    options = _options(field)
    words = [
        word for option in options if get_origin(option) is Literal for word in get_args(option)
    ]
    return any(get_origin(option) is tuple for option in options) and value not in words
