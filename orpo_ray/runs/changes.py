"""Which settings may change when a run is resumed. The rest would make it another run.

This module is pure: it reads and writes no files.
"""

import copy
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from orpo_ray.config import RunConfig, dump
from orpo_ray.errors import ConfigError

# Settings that may change when a run is resumed. They decide where work is done and files are kept,
# and what is evaluated, saved and logged. With our own engine they do not change what is trained.
# With TRL's, there is one exception: KTO depends on which pairs share a micro-batch.
FREE_KEYS = (
    "storage",
    "scale.",
    "search",
    "compare",
    "training.tokens_per_microbatch",
    "training.memory_limit",
    "training.eval_every",
    "training.samples",
    "training.checkpoint_every",
    "training.keep",
    "training.adapter_from",
    "training.trackers",
    "training.trl_metric_names",
)

EXTENSIONS = "extensions"
"""The key of run.json that lists extensions.

Each has the step after which it began, and the settings and metrics before it.
"""
EXTENSION_KEYS = (
    "training.max_steps",
    "training.epochs",
    "training.learning_rate",
    "training.schedule",
    "training.warmup",
)
"""Settings that define a new schedule over further steps."""


def refuse_changed_config(
    stored: Mapping[str, Any],
    config: RunConfig,
    free: tuple[str, ...] = FREE_KEYS,
    extended_from: Mapping[str, Any] | None = None,
    *,
    can_continue: bool = False,
) -> None:
    """Raise ConfigError if settings changed since the run began. Those in `free` may change.

    The error names the first that changed. `extended_from` has the settings from before the run was
    extended. `can_continue`: the run is finished, and --extend can continue it.
    """
    before, now = flatten(_as_read_now(stored, config, free)), flatten(dump(config))
    # Another kind has other settings: it is what changed, and they follow from it.
    keys = sorted(before.keys() | now.keys(), key=lambda key: (not key.endswith(".kind"), key))
    changed = [key for key in keys if before.get(key) != now.get(key)]
    changed = [key for key in changed if not key.startswith(free)]
    changed = [key for key in changed if not _is_moved(before.get(key), now.get(key), config)]
    if changed:
        key = changed[0]
        more = (
            f" (and {len(changed) - 1} more: {', '.join(changed[1:4])})" if len(changed) > 1 else ""
        )
        at_start = before | flatten(extended_from or {})
        was_extended = at_start.get(key) != before.get(key)
        made = "was extended to" if was_extended else "was made with"
        advice = "give the new run another name, or restore the setting"
        if was_extended:
            advice = "repeat the settings of the extension, or use --extend for more steps"
        elif can_continue and set(changed) <= set(EXTENSION_KEYS):
            advice = f"--extend continues it with more steps; otherwise {advice}"
        raise ConfigError(
            f"{key}: {_written(now, key)} here, but run {config.name} {made} "
            f"{_written(before, key)}{more}; {advice}"
        )


def _written(settings: Mapping[str, Any], key: str) -> str:
    """A value as a config has it."""
    if key not in settings:
        return "nothing"
    return "null" if settings[key] is None else repr(settings[key])


def _as_read_now(
    stored: Mapping[str, Any], config: RunConfig, free: tuple[str, ...]
) -> Mapping[str, Any]:
    """The settings that a run began with, in the form of this version.

    A setting that the older version did not have gets its default. A setting that may change has
    its present value. A key that this version does not have stays as it is. If this version refuses
    a value, everything stays as it is.
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
    """A copy of stored settings, in which those that may change have their present values."""
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
    """Remove a key from the tree. Returns it as a dotted key with its value."""
    at: Any = tree
    names = []
    for part in path[:-1]:
        if isinstance(at, dict) and part in at:  # otherwise it is the tag of a union
            at = at[part]
            names.append(part)
    if isinstance(at, dict):
        at.pop(path[-1], None)
    return {".".join([*names, path[-1]]): value}


def _is_moved(before: Any, now: Any, config: RunConfig) -> bool:
    """Whether both values name the same file of a storage that was moved, such as an adapter."""
    if not (isinstance(before, str) and isinstance(now, str)):
        return False
    place = config.place.removesuffix(config.name)
    return now.startswith(place) and before.endswith(f"/{now.removeprefix(place)}")


def refuse_changed_identity(
    stored: Mapping[str, str], name: str, identity: Mapping[str, str]
) -> None:
    """Raise ConfigError if data, tokenizer or weights changed since the run began.

    They can change while the settings that name them stay the same.
    """
    for key, value in identity.items():
        if stored.get(key, value) != value:
            raise ConfigError(
                f"{key}: not what run {name} began with ({stored[key][:16]} then, {value[:16]} "
                "now); give the new run another name, or restore what was there"
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
