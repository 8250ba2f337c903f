"""Reads YAML text as plain data, with the line of every key. It is stricter than PyYAML."""

import re
from typing import Any

import yaml

Key = tuple[str | int, ...]

_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")
}
_MAX_DEPTH = 32
_MAX_ENTRIES = 100_000


class NotPlainYamlError(Exception):
    """Text that is not YAML, or not plain; `line` counts from 1."""

    def __init__(self, problem: str, line: int | None = None):
        super().__init__(" ".join(problem.split()))
        self.line = line


class _Loader(yaml.SafeLoader):
    """A date stays text, 1e-4 is a number, and a mapping cannot hold a key twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be a plain name", problem_mark=key.start_mark
                )
            if key.value in seen:
                problem = f"{key.value} stands twice, first in line {seen[key.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen[key.value] = key.start_mark.line + 1
        self.flatten_mapping(node)
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse(text: str) -> tuple[Any, dict[Key, int]]:
    """The data, and the line of each key path. Raises NotPlainYamlError."""
    lines: dict[Key, int] = {}
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        return None if root is None else _plain(loader, root, (), lines), lines
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        ours = type(error) is yaml.MarkedYAMLError
        problem = error.problem or str(error)
        hint = "; indent with spaces" if r"'\t'" in problem else ""
        raise NotPlainYamlError(f"{'' if ours else 'not YAML: '}{problem}{hint}", line) from error
    except yaml.reader.ReaderError as error:
        problem = f"not YAML: the character {text[error.position]!r} is not allowed"
        raise NotPlainYamlError(problem, text.count("\n", 0, error.position) + 1) from error
    except RecursionError:
        raise NotPlainYamlError("nested too deeply") from None


def _plain(loader: _Loader, node: yaml.Node, at: Key, lines: dict[Key, int]) -> Any:
    """A node as plain data of its own.

    An alias becomes a copy, so that a change of one place does not change the other.
    """
    if node.tag not in _TAGS:
        raise yaml.MarkedYAMLError(
            problem=f"the tag {node.tag} is not allowed", problem_mark=node.start_mark
        )
    if len(at) > _MAX_DEPTH or len(lines) > _MAX_ENTRIES:
        raise yaml.MarkedYAMLError(
            problem="nested too deeply or too large", problem_mark=node.start_mark
        )
    if isinstance(node, yaml.MappingNode):
        data = {}
        for key, value in node.value:
            lines[(*at, key.value)] = key.start_mark.line + 1
            data[key.value] = _plain(loader, value, (*at, key.value), lines)
        return data
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*at, index)] = item.start_mark.line + 1
        return [_plain(loader, item, (*at, index), lines) for index, item in enumerate(node.value)]
    try:
        value = loader.construct_object(node)
        # JSON writes a character beyond 16 bits as two halves, and PyYAML does not join them.
        return (
            value.encode("utf-16", "surrogatepass").decode("utf-16")
            if isinstance(value, str)
            else value
        )
    except (ValueError, KeyError, IndexError) as error:
        problem = f"{shown(node.value)} is not {node.tag.rpartition(':')[2]}"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error


def shown(value: Any) -> str:
    """A value for a message: on one line, and cut if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
