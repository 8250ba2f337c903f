"""Finds a base's config.json: in its folder, in the hub's cache, in our table, or on the hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from orpo_ray.config.storage import expanded, inside, is_gguf, is_url
from orpo_ray.errors import CannotTellError, ConfigError, on_one_line
from orpo_ray.planner.shapes import Shape, known_shape, read_shape
from orpo_ray.runs.console import SILENT, Announce
from orpo_ray.storage import fetched

_CONFIG, _ADAPTER = "config.json", "adapter_config.json"


class Hub(Protocol):
    """What the planner asks of the Hugging Face hub."""

    def cached(self, name: str, revision: str | None) -> Path | None:
        """The config.json of a base in this server's cache."""

    def download(self, name: str, revision: str | None) -> Path:
        """The config.json of a base, fetched. Raises OSError or ValueError."""


class HuggingFace:
    """The hub's own client. It is imported only for a base that is not here."""

    def cached(self, name: str, revision: str | None) -> Path | None:
        """The config.json of a base in this server's cache."""
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(name, _CONFIG, revision=revision)
        except ValueError:  # no name of the hub; `download` says so
            return None
        return Path(found) if isinstance(found, str) else None

    def download(self, name: str, revision: str | None) -> Path:
        """The config.json of a base, fetched. No weight is."""
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, _CONFIG, revision=revision))


@dataclass(frozen=True)
class Found:
    """The shape of a base, and where its sizes are from.

    `folder` has the files of the base that are on this server, None if there are none.
    """

    shape: Shape
    source: str
    folder: Path | None = None


def find_shape(
    base: str,
    revision: str | None = None,
    hub: Hub | None = None,
    announce: Announce = SILENT.announce,
) -> Found:
    """The shape of a base as `model.base` writes it.

    A common base needs no network: the table is asked before the hub, whose client tries for half a
    minute where there is no network. Raises ConfigError if there is no such base, and
    CannotTellError if its layers are not known.
    """
    if is_gguf(base):
        _refuse_gguf(base)
    if is_url(base):
        return _read(fetched(inside(base, _CONFIG)), base, f"{_CONFIG} in {base}")
    folder = expanded(base, "model.base")
    if folder.is_dir():
        return _read(folder / _CONFIG, base, f"{_CONFIG} in {base}")
    if base.startswith((".", "/", "~")):
        raise ConfigError(f"model.base: no folder {base}")
    hub = hub or HuggingFace()
    if cached := hub.cached(base, revision):
        return _read(cached, base, "config.json in the hub's local cache")
    if known := known_shape(base):
        return Found(known, "the planner's table of common bases")
    announce(f"looking for {base} on the Hugging Face hub")
    return _on_hub(base, revision, hub)


def _refuse_gguf(base: str) -> NoReturn:
    if not expanded(base, "model.base").is_file():
        raise ConfigError(f"model.base: no file {base}")
    raise CannotTellError(
        f"model.base: the planner reads no GGUF file; plan with the hub name or the folder that "
        f"{base} was made from"
    )


def _on_hub(base: str, revision: str | None, hub: Hub) -> Found:
    try:
        path = hub.download(base, revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.base: {base} is no folder here, not in the hub's local cache and not in the "
            f"planner's table, and the hub gives no {_CONFIG}: {on_one_line(error)}"
        ) from error
    return _read(path, base, f"{_CONFIG} on the hub")


def _read(path: Path, base: str, source: str) -> Found:
    """The shape that a file describes."""
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = ""
        if (path.parent / _ADAPTER).is_file():
            hint = (
                f"; it holds an adapter: set adapter.init_from={base}, and model.base to its base"
            )
        raise ConfigError(f"model.base: {base} has no {_CONFIG}{hint}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.base: {_CONFIG} of {base} cannot be read: {on_one_line(error)}"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(f"model.base: {_CONFIG} of {base} holds no settings")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise CannotTellError(
            f"model.base: the weights of {base} are quantised already "
            f"({method or 'unknown method'}), and the planner knows bases "
            "with whole weights only; plan with the base that it was made from"
        )
    return Found(read_shape(config, base), source, path.parent)
