"""A draft as YAML: our settings, above each what differs, at the end what has no counterpart."""

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from orpo_ray.config.foreign.draft import Draft
from orpo_ray.config.plain_yaml import shown

_SECTIONS = ("model", "adapter", "data", "objective", "training", "scale")
_WIDTH = 100
_NO_WIDTH = 10**6


def tree_of(draft: Draft) -> dict[str, Any]:
    """The settings as nested sections, as a YAML file has them."""
    tree: dict[str, Any] = {}
    for key, value in draft.settings.items():
        section, dot, name = key.rpartition(".")
        if dot:
            tree.setdefault(section, {})[name] = value
        else:
            tree[name] = value
    return tree


def as_yaml(draft: Draft, file: str) -> str:
    """The text of the config; `file` is where it comes from."""
    tree = tree_of(draft)
    lines = [*_comment(f"From {file}, a config of {draft.project}; comments say what differs.", 0)]
    for name in ("name", "storage"):
        if name in tree:
            lines += _entry(draft, name, tree[name], indent=0)
    for section in _SECTIONS:
        if section in tree:
            lines.append(f"{section}:")
            for name, value in tree[section].items():
                lines += _entry(draft, f"{section}.{name}", value, indent=2)
    return "\n".join([*lines, *_without_counterpart(draft)]) + "\n"


def _entry(draft: Draft, key: str, value: Any, indent: int) -> Iterator[str]:
    """One setting below its remarks."""
    for remark in dict.fromkeys(draft.remarks.get(key, ())):
        yield from _comment(remark, indent)
    name, width = key.rpartition(".")[2], _WIDTH - indent
    flow = None if isinstance(value, list | dict) else False
    text = _dumped({name: value}, flow, width)
    if isinstance(value, list | dict):
        line = f"{name}: {_dumped(value, flow=True, width=_NO_WIDTH)}"
        text = line if len(line) <= width else text
    yield textwrap.indent(text, " " * indent)


def _dumped(value: Any, flow: bool | None, width: int) -> str:
    text = yaml.safe_dump(
        value,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=flow,
        width=width,
    )
    return text.rstrip("\n")


def _without_counterpart(draft: Draft) -> Iterator[str]:
    if draft.lacking:
        yield "#"
        yield "# What has no counterpart:"
    for key, instead in draft.lacking.items():
        yield from _comment(f"{key}: {_plain(draft.foreign[key])}: {instead}", 0)
    if draft.unset:
        yield from _comment(f"{', '.join(draft.unset)}: nothing is set there", 0)


def _plain(value: Any) -> str:
    """A foreign value as its file writes it, on one line and not too long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if len(value) <= 60 and value.isprintable() else shown(value)
    return shown(value)


def _comment(text: str, indent: int) -> Iterator[str]:
    start = " " * indent + "# "
    yield from textwrap.wrap(
        " ".join(text.split()),
        width=_WIDTH,
        initial_indent=start,
        subsequent_indent=start,
        break_long_words=False,
        break_on_hyphens=False,
    )
