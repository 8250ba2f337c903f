"""What may change when the same command comes again, and what would make another run of it. Pure."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from orpo_ray.config import RunConfig, dump
from orpo_ray.errors import ConfigError

# Settings that may change on resume: they move work and files about, but not the numbers that come out.
FREE_KEYS = ("storage", "scale.", "search", "training.tokens_per_microbatch", "training.trackers")


def refuse_changed_config(stored: Mapping[str, Any], config: RunConfig, free: tuple[str, ...] = FREE_KEYS) -> None:
    """Raise ConfigError if a run was made with other settings than those in `free`, naming the first."""
    before, now = flatten(_as_read_now(stored)), flatten(dump(config))
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    changed = [key for key in changed if not key.startswith(free)]
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more: {', '.join(changed[1:4])})" if len(changed) > 1 else ""
        raise ConfigError(
            f"{key}: {now.get(key)!r} here, but run {config.name} was made with {before.get(key)!r}{more}; "
            "give the new run another name, or restore the setting"
        )


def _as_read_now(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings as an older version wrote them, with the defaults of what it did not know; else as they stand."""
    try:
        return dump(RunConfig.model_validate(stored))
    except ValidationError:
        return stored


def refuse_changed_identity(stored: Mapping[str, str], name: str, identity: Mapping[str, str]) -> None:
    """Raise ConfigError if data, tokenizer or weights behind unchanged settings are not those the run began with."""
    for key, value in identity.items():
        if stored.get(key, value) != value:
            raise ConfigError(
                f"{key}: not what run {name} began with ({stored[key][:16]} then, {value[:16]} now); "
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
