"""Which keys a config may have.

Some sections have several kinds, such as the objective. These functions list the keys of all kinds,
or only of the kinds that a config names.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orpo_ray.config.plain_yaml import Key

Tree = Mapping[str, Any]
EXTENDS = "extends"
"""A key at the top of a file, and of no config: it is gone when the file has been read."""


def dotted(key: Sequence[str | int]) -> str:
    """A key path as the command line writes it."""
    return ".".join(str(part) for part in key)


def without_numbers(key: Sequence[str | int]) -> Key:
    """A key path without the places in lists."""
    return tuple(part for part in key if not isinstance(part, int))


def fields_at(
    model: type[BaseModel], section: Sequence[str | int], tree: Tree | None = None
) -> list[str]:
    """Names that may stand in a section, as the YAML writes them.

    With a config as `tree`, only those of the kinds that it names.
    """
    models: list[type[BaseModel]] = [model]
    at: Any = tree
    for part in section:
        if isinstance(part, int):
            at = at[part] if isinstance(at, list | tuple) and part < len(at) else None
            continue
        at = at.get(part) if isinstance(at, Mapping) else None
        find = _all_sections if tree is None else _chosen_sections
        models = [inner for outer in models for inner in find(outer, str(part), at)]
    return sorted({name for found in models for name in names_of(found)})


def all_keys(model: type[BaseModel], tree: Tree | None = None) -> list[str]:
    """Every dotted key of a config: sections and values.

    With a config as `tree`, only those of the kinds that it names.
    """
    keys: list[str] = []
    for name in names_of(model):
        keys.append(name)
        content = None if tree is None else tree.get(name)
        find = _all_sections if tree is None else _chosen_sections
        for inner in find(model, name, content):
            inside = None if tree is None else _section(content)
            keys.extend(f"{name}.{key}" for key in all_keys(inner, inside))
    return list(dict.fromkeys(keys))


def values_outside_lists(model: type[BaseModel]) -> list[str]:
    """Every dotted key that an override can set."""
    keys: list[str] = []
    for name in names_of(model):
        sections = _all_sections(model, name, None)
        annotation = getattr(_field(model, name), "annotation", None)
        if not sections:
            keys.append(name)
        elif not any(get_origin(part) is tuple for part in (annotation, *get_args(annotation))):
            keys.extend(
                f"{name}.{key}" for inner in sections for key in values_outside_lists(inner)
            )
    return list(dict.fromkeys(keys))


def kind_at(model: type[BaseModel], name: str, content: Any) -> str:
    """The kind that a section names, or the default of its field; "" if there is none."""
    kind = _section(content).get("kind")
    if kind is None:
        kind = getattr(getattr(_field(model, name), "default", None), "kind", None)
    return "" if kind is None else str(kind)


def names_of(model: type[BaseModel]) -> list[str]:
    """The fields of a section, as the YAML writes them."""
    return [field.alias or name for name, field in model.model_fields.items()]


def _all_sections(model: type[BaseModel], name: str, content: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold, also inside unions and lists."""
    field = _field(model, name)
    return list(_sections(field.annotation)) if field is not None else []


def _chosen_sections(model: type[BaseModel], name: str, content: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold; if it has several kinds, the one that is named."""
    models = _all_sections(model, name, content)
    kind = kind_at(model, name, content)
    meant = [found for found in models if "kind" in names_of(found) and _own_kind(found) == kind]
    return meant if len(models) > 1 and meant else models


def _own_kind(model: type[BaseModel]) -> Any:
    return model.model_fields["kind"].default


def _field(model: type[BaseModel], name: str) -> FieldInfo | None:
    return next(
        (field for key, field in model.model_fields.items() if (field.alias or key) == name), None
    )


def _section(content: Any) -> Tree:
    return content if isinstance(content, Mapping) else {}


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)
