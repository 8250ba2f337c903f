"""Turns the complaints of pydantic into one line for the user.

The line names the place, the key, what is wrong and what to write instead.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from orpo_ray.config.keys import dotted, fields_at, kind_at
from orpo_ray.config.near import near_name
from orpo_ray.config.plain_yaml import Key, shown
from orpo_ray.config.unknown import hint

_UNKNOWN = "extra_forbidden"
_OVERRIDE = "override "


def explain(
    model: type[BaseModel],
    error: ValidationError,
    places: Mapping[Key, str],
    tree: Mapping[str, Any],
) -> str:
    """The first mistake in full, and further ones in short. Unknown keys come first.

    `tree` is the refused config. It tells the kind of the section that holds an unknown key.
    """
    details = sorted(error.errors(), key=lambda detail: detail["type"] != _UNKNOWN)
    found = [(_clean(model, detail), detail) for detail in details]
    first = found[0][0]
    key = max((k for k, _ in found if k[: len(first)] == first), key=len)
    here = [detail for k, detail in found if k == key]
    unknown = [k for k, detail in found if detail["type"] == _UNKNOWN and k != key]
    hints = {k: hint(model, k, tree).short for k in unknown}
    more = _further(hints, _wrong(found, key, unknown))
    message = _message(model, key, here, tree)
    # pydantic reports a wrong kind under the key of its section.
    is_kind = _telling(here)["type"].startswith("union_tag")
    place = _place((*key, "kind") if is_kind else key, _telling(here), places)
    of_another_kind = details[0]["type"] == _UNKNOWN and key[-1] in fields_at(model, key[:-1])
    if of_another_kind and (kind := _kind_override(key, places)):
        section = dotted(key[:-1])
        whole = f"{section}={{kind: {kind_at(model, section, tree.get(section))}}}"
        return f"{kind}: {message} ({place}), or replace the section: {whole}{more}"
    return f"{place}: {message}{more}"


def _wrong(found: Sequence[tuple[Key, Any]], key: Key, unknown: Sequence[Key]) -> list[Key]:
    """Keys with other mistakes than the first, which is at `key`.

    A missing key is not reported if an unknown key of its section may be its misspelling.
    """
    misspelt_in = {k[:-1] for k in (key, *unknown)}
    wrong = [
        k
        for k, detail in found
        if detail["type"] != _UNKNOWN
        and not (detail["type"] == "missing" and k[:-1] in misspelt_in)
        and k[: len(key)] != key[: len(k)]
    ]
    return list(dict.fromkeys(wrong))


def _further(unknown: Mapping[Key, str], wrong: Sequence[Key]) -> str:
    """Further unknown keys, each with a hint or "", and the keys of other mistakes."""
    named = [dotted(key) + (f" ({short})" if short else "") for key, short in unknown.items()]
    parts = [f"also unknown: {', '.join(named)}"] if named else []
    parts += [f"also wrong: {', '.join(map(dotted, wrong))}"] if wrong else []
    return f" ({'; '.join(parts)})" if parts else ""


def _kind_override(key: Key, places: Mapping[Key, str]) -> str | None:
    """The override of `kind` that made a key of the file unknown, or None."""
    kind = places.get((*key[:-1], "kind"), "")
    is_file = not places.get(key, _OVERRIDE).startswith(_OVERRIDE)
    return kind if kind.startswith(_OVERRIDE) and is_file else None


def _place(key: Key, detail: Any, places: Mapping[Key, str]) -> str:
    """Where the user should look.

    For a broken rule it is the place of a setting that the message names: that of an override if
    one sets any of these, else that in the file rather than in one that the file extends. For other
    mistakes it is the place of the key.
    """
    if detail["type"] == "value_error":
        file = places[()]
        named = [
            (*key, *word.split(".")) for word in re.findall(r"[a-z_]+(?:\.[a-z_]+)*", detail["msg"])
        ]
        found = sorted(
            (places[k] for k in named if k in places),
            key=lambda place: (not place.startswith(_OVERRIDE), not place.startswith(f"{file}:")),
        )
        if found:
            return found[0]
    return next(places[key[:n]] for n in range(len(key), -1, -1) if key[:n] in places)


def _telling(details: list[Any]) -> Any:
    """The complaint that says most.

    A field may accept several types. If the value fits one of them but breaks a rule, that
    complaint says most, so it is taken first.
    """
    return next((detail for detail in details if detail["type"] == "value_error"), details[0])


def _message(model: type[BaseModel], key: Key, details: list[Any], tree: Mapping[str, Any]) -> str:
    """What is wrong at one key. A field of several types has one complaint for each type."""
    name, detail = dotted(key), _telling(details)
    match detail["type"]:
        case "extra_forbidden":
            return f"{name}: {hint(model, key, tree).message}"
        case "missing":
            return f"{name}: missing; {dotted(key[:-1]) or 'every run'} needs it"
        case "union_tag_invalid":
            tag, expected = detail["ctx"]["tag"], detail["ctx"]["expected_tags"]
            near = near_name(str(tag), expected.replace("'", "").split(", "))
            meant = f"; did you mean {near}?" if near else ""
            return f"{name}.kind: {tag!r} is not one of {expected}{meant}"
        case "union_tag_not_found":
            return f"{name}.kind: missing; it names the objective"
        case "value_error":
            message = detail["msg"].removeprefix("Value error, ")
            return f"{name}: {message}" if name else message
    wanted = " or ".join(dict.fromkeys(_wanted(model, key, d) for d in details)).replace(
        " or be ", " or "
    )
    if detail["input"] is None and name:
        return f"{name}: has no value; it must {wanted}"
    return f"{name}: must {wanted}, not {shown(detail['input'])}".removeprefix(": ")


def _wanted(model: type[BaseModel], key: Key, detail: Any) -> str:
    """What a value must be, in the words of someone who writes YAML."""
    match detail["type"]:
        case "model_attributes_type":
            return "be a section that names its kind, such as {kind: orpo}"
        case "model_type" | "dict_type":
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


def _clean(model: type[BaseModel], detail: Any) -> Key:
    """The key of a complaint, without the union tags and type names in pydantic's location."""
    key: list[str | int] = []
    for part in detail["loc"]:
        if isinstance(part, int) or part in fields_at(model, key):
            key.append(part)
    if detail["type"] == _UNKNOWN and key[-1:] != [detail["loc"][-1]]:
        key.append(detail["loc"][-1])
    return tuple(key)
