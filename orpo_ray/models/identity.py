"""Hashes that identify the models from which a run starts.

With them a resumed run notices another model. No weight is loaded.
"""

import re
from pathlib import Path

from transformers import AutoConfig

from orpo_ray.config.model import ModelConfig
from orpo_ray.config.storage import is_url
from orpo_ray.errors import ConfigError
from orpo_ray.models.fingerprint import folder_fingerprint
from orpo_ray.models.tokenizer import base_location, explain_load_error
from orpo_ray.models.trained import (
    ADAPTER_CONFIG,
    fetch_trained,
    find_adapter,
    trained_folder,
)

_IN_THE_CACHE = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([^/]+)")
"""A folder of the hub's local cache: owner, name and commit."""


def is_hub_name(place: str) -> bool:
    """Whether a place is `owner/name` on the hub, and not a file or folder here."""
    looks_so = place.count("/") == 1 and not place.startswith((".", "/", "~")) and not is_url(place)
    return looks_so and not Path(place).exists()


def hub_name(base: str) -> str | None:
    """The base's name on the hub; None for a folder that does not come from there."""
    if is_hub_name(base):
        return base
    cached = _IN_THE_CACHE.search(Path(base).as_posix())
    return "/".join(cached.groups()[:2]) if cached else None


def hub_revision(config: ModelConfig) -> str | None:
    """The commit of a base from the hub; None for any other base."""
    if is_hub_name(config.base):
        return base_fingerprint(config).rpartition("@")[2]
    cached = _IN_THE_CACHE.search(Path(config.base).as_posix())
    return cached.group(3) if cached else None


def base_fingerprint(config: ModelConfig) -> str:
    """What identifies the base's weights.

    For a hub model it is the commit, for a local folder a hash of its content.
    """
    local = Path(base_location(config))
    if local.is_dir():
        return folder_fingerprint(local, ("*.safetensors", "config.json"))
    try:
        hub_config = AutoConfig.from_pretrained(
            base_location(config), revision=config.revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ConfigError(explain_load_error(config.base, "configuration", error)) from error
    return f"{config.base}@{hub_config._commit_hash}"


def adapter_fingerprint(path: str) -> str:
    """Content hash of an adapter's weights and shape."""
    return folder_fingerprint(find_adapter(path), ("adapter_model.safetensors", ADAPTER_CONFIG))


def trained_fingerprint(place: str) -> str:
    """Content hash of what a run made: an adapter, or a whole model. A URL is fetched first."""
    fetch_trained(place)
    return folder_fingerprint(trained_folder(place), ("*.safetensors", "*config.json"))
