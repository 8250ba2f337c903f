"""YAML file and dotted overrides in, a checked RunConfig out; every complaint names file, line and key."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from orpo_ray.config.run import RunConfig
from orpo_ray.errors import ConfigError

Key = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML and apply `key=value` overrides. Raises ConfigError with one line on any mistake."""
    tree, lines = read_yaml(Path(path))
    for override in overrides:
        key, value = parse_override(override)
        set_dotted(tree, key, value)
        lines = {k: line for k, line in lines.items() if k[: len(key)] != key}
        lines[key] = f"override {override!r}"
    return build(RunConfig, tree, lines)


def load_resolved(path: Path) -> RunConfig:
    """Read a `config.json` that a run wrote."""
    return build(RunConfig, json.loads(path.read_text(encoding="utf-8")), {(): str(path)})


def dump(config: BaseModel) -> dict[str, Any]:
    """The config as plain data, under the names that the YAML uses."""
    return config.model_dump(mode="json", by_alias=True)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    """The YAML as plain data, and for each key the `file:line` it stands on."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: a config is a YAML mapping of sections such as model, data and training")
    lines: dict[Key, str] = {(): str(path)}
    for key, node in _walk(root, (), path):
        lines[key] = f"{path}:{node.start_mark.line + 1}"
    try:
        tree = yaml.SafeLoader("").construct_document(root)
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not plain YAML: {error.problem}") from error
    return tree, lines


def _walk(node: yaml.Node, at: Key, path: Path) -> Iterator[tuple[Key, yaml.Node]]:
    """Every (key path, key node) of a YAML document. Raises ConfigError where a mapping has a key twice."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value in node.value:
            name, line = str(key_node.value), key_node.start_mark.line + 1
            if name in seen:
                raise ConfigError(f"{path}:{line}: {_dotted((*at, name))} stands twice, first in line {seen[name]}")
            seen[name] = line
            yield (*at, name), key_node
            yield from _walk(value, (*at, name), path)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*at, index), item
            yield from _walk(item, (*at, index), path)


def parse_override(text: str) -> tuple[Key, Any]:
    """Split `training.learning_rate=3e-4` into its key path and its value, read as YAML."""
    dotted, equals, value = text.partition("=")
    if not equals or not dotted.strip("."):
        raise ConfigError(f"{text!r} is not an override; write key=value, such as training.learning_rate=3e-4")
    key = tuple(int(part) if part.isdigit() else part for part in dotted.strip().split("."))
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not YAML") from error


def set_dotted(tree: dict[str, Any], key: Key, value: Any) -> None:
    """Set one value in nested plain data, making sections on the way. Raises ConfigError where there is no place."""
    at: Any = tree
    for depth, part in enumerate(key):
        last = depth == len(key) - 1
        if isinstance(at, list):
            if not isinstance(part, int) or part >= len(at):
                raise ConfigError(f"{_dotted(key)}: the list has {len(at)} items, so its keys are 0 to {len(at) - 1}")
        elif isinstance(at, dict):
            if not last and at.get(part) is None:
                at[part] = {}
        else:
            raise ConfigError(f"{_dotted(key)}: {_dotted(key[:depth])} is a value, not a section")
        if last:
            at[part] = value
        else:
            at = at[part]


def build(model: type[Model], tree: Mapping[str, Any], lines: Mapping[Key, str]) -> Model:
    """Validate plain data; the first mistake becomes one ConfigError line that names its place."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(model, error, lines)) from None


def _explain(model: type[BaseModel], error: ValidationError, lines: Mapping[Key, str]) -> str:
    """The mistakes of a config: the first one in full, the number of others behind it."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    first = details[0]
    key = _clean(model, first)
    others = {_clean(model, detail)[: len(key)] for detail in details} - {key}
    more = f" (and {len(others)} more)" if others else ""
    where = next(lines[key[:n]] for n in range(len(key), -1, -1) if key[:n] in lines)
    same_key = [detail for detail in details if _clean(model, detail) == key]
    return f"{where}: {_message(model, key, same_key)}{more}"


def _message(model: type[BaseModel], key: Key, details: list[Any]) -> str:
    """What is wrong at one key; a field of several types brings one complaint for each."""
    name, detail = _dotted(key), details[0]
    if detail["type"] == "extra_forbidden":
        return f"{name}: {_suggestion(model, key, detail['loc'])}"
    if detail["type"] == "missing":
        return f"{name}: missing; every run needs it"
    if detail["type"] == "union_tag_invalid":
        return f"{name}.kind: {detail['ctx']['tag']!r} is not one of {detail['ctx']['expected_tags']}"
    if detail["type"] == "union_tag_not_found":
        return f"{name}.kind: missing; it names the objective"
    if detail["type"] == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return f"{name}: {message}" if name else message
    wanted = " or ".join(dict.fromkeys(d["msg"].removeprefix("Input should be ") for d in details))
    return f"{name}: must be {wanted[0].lower()}{wanted[1:]}, not {detail['input']!r}"


def _suggestion(model: type[BaseModel], key: Key, loc: tuple[str | int, ...]) -> str:
    """What to write instead of an unknown key: the nearest known one, or those of its section."""
    *section, wrong = key
    known = fields_at(model, tuple(section))
    if wrong in known:
        return f"{loc[-2]} has no {wrong}; remove it"
    near = difflib.get_close_matches(str(wrong), known, n=1, cutoff=0.6)
    if near:
        return f"unknown key; did you mean {_dotted((*section, near[0]))}?"
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


def _names(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _models_of(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """The sections that a field may hold, whatever union or list they stand in."""
    annotation = next((f.annotation for n, f in model.model_fields.items() if (f.alias or n) == name), None)
    return list(_sections(annotation))


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def _clean(model: type[BaseModel], detail: Any) -> Key:
    """Where a pydantic complaint points, without the union tags and type names it mixes into the location."""
    key: list[str | int] = []
    for part in detail["loc"]:
        if isinstance(part, int) or part in fields_at(model, tuple(key)):
            key.append(part)
    if detail["type"] == "extra_forbidden" and key[-1:] != [detail["loc"][-1]]:
        key.append(detail["loc"][-1])
    return tuple(key)


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)
