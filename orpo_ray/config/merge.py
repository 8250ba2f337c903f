"""Puts the settings of a stage, or of a file that extends another one, over those before them."""

from collections.abc import Mapping
from typing import Any

from orpo_ray.config.keys import kind_at
from orpo_ray.config.plain_yaml import Key
from orpo_ray.config.run import RunConfig

_OBJECTIVE = "objective"


def merged(common: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sections with single settings replaced; anything else is replaced as a whole.

    So is an objective of another kind: each kind has settings of its own.
    """
    tree = dict(common)
    for name, content in changes.items():
        is_section = isinstance(content, Mapping)
        tree[name] = {**_kept(common, changes, name), **content} if is_section else content
    return tree


def merged_places(
    common: Mapping[str, Any],
    changes: Mapping[str, Any],
    places: Mapping[Key, str],
    own: Mapping[Key, str],
) -> dict[Key, str]:
    """Where each setting of the merged config was written.

    `places` are those of `common`, and `own` are those of `changes`.
    """
    kept = {(name, key) for name in changes for key in _kept(common, changes, name)}
    inherited = {
        key: place
        for key, place in places.items()
        if key and (key[0] not in changes or key[:2] in kept)
    }
    return {**inherited, **own}


def _kept(common: Mapping[str, Any], changes: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The settings of a section that stay as they are when `changes` are put over it."""
    before, content = common.get(name), changes[name]
    if not isinstance(before, Mapping) or not isinstance(content, Mapping):
        return {}
    if name == _OBJECTIVE and "kind" in content and content["kind"] != _kind(before):
        return {}
    return {key: value for key, value in before.items() if key not in content}


def _kind(objective: Mapping[str, Any]) -> str:
    return kind_at(RunConfig, _OBJECTIVE, objective)
