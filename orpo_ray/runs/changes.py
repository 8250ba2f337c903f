"""What may change when the same command comes again, and what would make another run of it.

Pure.
"""

import copy
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from orpo_ray.config import RunConfig, dump
from orpo_ray.errors import ConfigError

# Settings that may change on resume: they move work and files about, but not the numbers that come
# out.
# Nor do evaluations, checkpoints and what is logged.
FREE_KEYS = (
    "storage",
    "scale.",
    "search",
    "training.tokens_per_microbatch",
    "training.eval_every",
    "training.checkpoint_every",
    "training.keep",
    "training.adapter_from",
    "training.trackers",
    "training.trl_metric_names",
)


def refuse_changed_config(
    stored: Mapping[str, Any], config: RunConfig, free: tuple[str, ...] = FREE_KEYS
) -> None:
    """Raise ConfigError if a run was made with other settings than those in `free`, naming the
    first.
    """
    before, now = flatten(_as_read_now(stored, config, free)), flatten(dump(config))
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    changed = [key for key in changed if not key.startswith(free)]
    changed = [key for key in changed if not _is_moved(before.get(key), now.get(key), config)]
    if changed:
        key = changed[0]
        more = (
            f" (and {len(changed) - 1} more: {', '.join(changed[1:4])})" if len(changed) > 1 else ""
        )
        raise ConfigError(
            f"{key}: {now.get(key)!r} here, but run {config.name} was made with "
            f"{before.get(key)!r}{more}; "
            "give the new run another name, or restore the setting"
        )


def _as_read_now(
    stored: Mapping[str, Any], config: RunConfig, free: tuple[str, ...]
) -> Mapping[str, Any]:
    """Settings as an older version wrote them, with the defaults of what it did not know.

    What may change counts as it is now. What this version does not know stays as it stands; so does
    everything, if this version refuses a value.
    """
    tree = _with_free(stored, dump(config), free)
    unknown: dict[str, Any] = {}
    try:
        return dump(RunConfig.model_validate(tree))
    except ValidationError as error:
        for detail in error.errors():
            if detail["type"] != "extra_forbidden":
                return stored
            unknown |= _taken_out(tree, [str(part) for part in detail["loc"]], detail["input"])
    try:
        return dump(RunConfig.model_validate(tree)) | unknown
    except ValidationError:
        return stored


def _with_free(
    stored: Mapping[str, Any], now: Mapping[str, Any], free: tuple[str, ...]
) -> dict[str, Any]:
    """A copy of stored settings with those that may change as they are now."""
    tree: dict[str, Any] = copy.deepcopy(dict(stored))
    for key in free:
        *sections, name = key.rstrip(".").split(".")
        old, new = tree, now
        for section in sections:
            old, new = old.get(section) or {}, new.get(section) or {}
        if name in new:
            old[name] = new[name]
    return tree


def _taken_out(tree: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """Remove a key of a section from the tree; it as a dotted key with its value."""
    at: Any = tree
    names = []
    for part in path[:-1]:
        if isinstance(at, dict) and part in at:  # else it is the tag of a union
            at = at[part]
            names.append(part)
    if isinstance(at, dict):
        at.pop(path[-1], None)
    return {".".join([*names, path[-1]]): value}


def _is_moved(before: Any, now: Any, config: RunConfig) -> bool:
    """Whether a value is the place of a run in this storage, which had another place before."""
    if not (isinstance(before, str) and isinstance(now, str)):
        return False
    place = config.place.removesuffix(config.name)
    return now.startswith(place) and before.endswith(f"/{now.removeprefix(place)}")


def refuse_changed_identity(
    stored: Mapping[str, str], name: str, identity: Mapping[str, str]
) -> None:
    """Raise ConfigError if data, tokenizer or weights behind unchanged settings are not those the
    run began with.
    """
    for key, value in identity.items():
        if stored.get(key, value) != value:
            raise ConfigError(
                f"{key}: not what run {name} began with ({stored[key][:16]} then, {value[:16]} "
                "now); "
                "give the new run another name, or restore what was there"
            )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain data as dotted keys; lists of sections become numbered keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
