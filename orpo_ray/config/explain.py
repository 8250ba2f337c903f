"""Pydantic's complaints in, one line out: where it stands, which key, what is wrong, what to write
instead.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from orpo_ray.config.plain_yaml import Key, shown


def explain(model: type[BaseModel], error: ValidationError, places: Mapping[Key, str]) -> str:
    """The first mistake in full, unknown keys before others, and the number of the others behind
    it.
    """
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    keys = [_clean(model, detail) for detail in details]
    key = max((k for k in keys if k[: len(keys[0])] == keys[0]), key=len)
    here = [detail for detail, k in zip(details, keys, strict=True) if k == key]
    count = len({k[: len(key)] for k in keys if k[: len(key)] != key[: len(k)]})
    more = f" (and {count} more)" if count else ""
    # A rule that a value breaks was found by whichever type the value fits otherwise.
    detail = next((detail for detail in here if detail["type"] == "value_error"), here[0])
    return f"{_place(key, detail, places)}: {_message(model, key, detail, here)}{more}"


def _place(key: Key, detail: Any, places: Mapping[Key, str]) -> str:
    """Where to look: for a broken rule the settings that it names, overridden ones first; else the
    key itself.
    """
    if detail["type"] == "value_error":
        named = [
            (*key, *word.split(".")) for word in re.findall(r"[a-z_]+(?:\.[a-z_]+)*", detail["msg"])
        ]
        found = sorted(
            (places[k] for k in named if k in places),
            key=lambda place: not place.startswith("override"),
        )
        if found:
            return found[0]
    return next(places[key[:n]] for n in range(len(key), -1, -1) if key[:n] in places)


def _message(model: type[BaseModel], key: Key, detail: Any, details: list[Any]) -> str:
    """What is wrong at one key; a field of several types brings one complaint for each."""
    name = dotted(key)
    match detail["type"]:
        case "extra_forbidden":
            return f"{name}: {_suggestion(model, key, detail['loc'])}"
        case "missing":
            return f"{name}: missing; {dotted(key[:-1]) or 'every run'} needs it"
        case "union_tag_invalid":
            return (
                f"{name}.kind: {detail['ctx']['tag']!r} is not one of "
                f"{detail['ctx']['expected_tags']}"
            )
        case "union_tag_not_found":
            return f"{name}.kind: missing; it names the objective"
        case "value_error":
            message = detail["msg"].removeprefix("Value error, ")
            return f"{name}: {message}" if name else message
    wanted = " or ".join(dict.fromkeys(_wanted(model, key, d) for d in details)).replace(
        " or be ", " or "
    )
    return f"{name}: must {wanted}, not {shown(detail['input'])}".removeprefix(": ")


def _wanted(model: type[BaseModel], key: Key, detail: Any) -> str:
    """What a value must be, in the words of someone who writes YAML."""
    match detail["type"]:
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"be a section with {', '.join(fields_at(model, key)) or 'keys'}"
        case "tuple_type":
            return "be a list"
        case "ip_v4_address":
            return "be an IPv4 address"
        case "too_short":
            return f"have at least {detail['ctx']['min_length']} item"
        case "string_type":
            return "be text (write it in quotes)"
    message = re.sub(r"^\w+ should ", "", detail["msg"])
    return re.sub(r", (unable to|got) .*", "", message)


def _suggestion(model: type[BaseModel], key: Key, loc: tuple[str | int, ...]) -> str:
    """What to write instead of an unknown key: the nearest known one, or those of its section."""
    *section, wrong = key
    known = fields_at(model, tuple(section))
    if wrong in known:
        return f"{loc[-2]} has no {wrong}; remove it"
    near = difflib.get_close_matches(str(wrong), known, n=1, cutoff=0.6)
    if near:
        return f"unknown key; did you mean {dotted((*section, near[0]))}?"
    elsewhere = [k for k in all_keys(model) if k.split(".")[-1] == str(wrong)]
    if elsewhere:
        return f"unknown key; did you mean {elsewhere[0]}?"
    return f"unknown key; known here: {', '.join(sorted(known))}" if known else "unknown key"


def fields_at(model: type[BaseModel], section: Key) -> list[str]:
    """Names that may stand in a section, as the YAML writes them."""
    models: list[type[BaseModel]] = [model]
    for part in section:
        if isinstance(part, int):
            continue
        models = [inner for outer in models for inner in _models_of(outer, str(part))]
    return sorted({name for m in models for name in _names(m)})


def all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a config, sections and values."""
    keys: list[str] = []
    for name in _names(model):
        keys.append(prefix + name)
        for inner in _models_of(model, name):
            keys.extend(all_keys(inner, f"{prefix}{name}."))
    return list(dict.fromkeys(keys))


def dotted(key: Key) -> str:
    """A key path as the command line writes it."""
    return ".".join(str(part) for part in key)


def _names(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _models_of(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """The sections that a field may hold, whatever union or list they stand in."""
    annotation = next(
        (f.annotation for n, f in model.model_fields.items() if (f.alias or n) == name), None
    )
    return list(_sections(annotation))


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def _clean(model: type[BaseModel], detail: Any) -> Key:
    """Where a pydantic complaint points, without the union tags and type names it mixes into the
    location.
    """
    key: list[str | int] = []
    for part in detail["loc"]:
        if isinstance(part, int) or part in fields_at(model, tuple(key)):
            key.append(part)
    if detail["type"] == "extra_forbidden" and key[-1:] != [detail["loc"][-1]]:
        key.append(detail["loc"][-1])
    return tuple(key)
