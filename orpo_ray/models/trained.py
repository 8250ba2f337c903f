"""Finds what was trained before: an adapter or a whole model, of a run or in its own folder."""

from pathlib import Path

from orpo_ray.config.storage import expanded, is_gguf, is_url, local_path
from orpo_ray.errors import ConfigError
from orpo_ray.storage import storage_at

ADAPTER_CONFIG = "adapter_config.json"
"""The file that PEFT writes beside an adapter's weights."""
_MODEL_CONFIG, _OF_A_RUN = "config.json", "run.json"


def missing_base(base: str) -> str | None:
    """What to say of a path with nothing there, or with no base; None for any other base.

    Raises ConfigError for the home of an unknown user.
    """
    if is_url(base):
        return None
    place = expanded(base, "model.base")
    if place.exists():
        return _holds_adapter(base, place)
    if is_gguf(base):
        return f"model.base: no file {base}"
    return f"model.base: no folder {base}" if base.startswith((".", "/", "~")) else None


def _holds_adapter(base: str, folder: Path) -> str | None:
    """What to say of a folder that holds an adapter and no whole model."""
    for place in (folder, folder / "adapter"):
        if (place / ADAPTER_CONFIG).is_file() and not any(place.glob("model*.safetensors")):
            return (
                f"model.base: {base} holds an adapter; set adapter.init_from={base}, and "
                "model.base to the base that it was trained on"
            )
    return None


def fetch_trained(place: str) -> None:
    """Copy to this server what a URL names.

    It may name a run, for its adapter or model, or a folder with an adapter or a whole model.
    """
    storage = storage_at(place)
    if not storage.is_remote:
        return
    folder = local_path(place)
    made = folder / "adapter"
    if any(storage.holds(made / name) for name in (ADAPTER_CONFIG, _MODEL_CONFIG)):
        storage.fetch_folder(made)
    # The folder of a run has a config.json, too. The run may be writing to it here, so it is not
    # fetched.
    elif storage.holds(folder / ADAPTER_CONFIG) or (
        storage.holds(folder / _MODEL_CONFIG) and not storage.holds(folder / _OF_A_RUN)
    ):
        storage.fetch_folder(folder)


def trained_folder(place: str) -> Path:
    """The folder on this server of what a place names: the one inside of a run, or the place."""
    folder = local_path(place)
    inside_run = folder / "adapter"
    return inside_run if inside_run.is_dir() else folder


def find_adapter(path: str) -> Path:
    """The adapter folder that a path means: the folder itself, or that in a finished run."""
    folder = local_path(path)
    for candidate in (folder, folder / "adapter"):
        if (candidate / ADAPTER_CONFIG).is_file():
            return candidate
    raise ConfigError(
        f"{path}: no adapter_config.json here or in its folder adapter/; is the run finished?"
    )
