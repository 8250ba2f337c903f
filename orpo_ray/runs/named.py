"""The run that a user names: by its YAML, or by the folder or URL where it lies."""

from collections.abc import Iterable
from os import PathLike, fspath
from pathlib import Path

from orpo_ray.config import RunConfig, load_config
from orpo_ray.config.storage import inside, is_url, local_path
from orpo_ray.errors import ConfigError
from orpo_ray.runs.files import CONFIG_FILE, RESULT_FILE, SEARCH_FILE, read_json
from orpo_ray.runs.search_run import FOLDER, find_search
from orpo_ray.storage import file_at, storage_at

_YAML = (".yaml", ".yml")
_MODELS_OWN = "model_type"
"""A key of every model's config.json, and of no run's."""


def named_config(place: str | PathLike[str], overrides: Iterable[str] = ()) -> RunConfig:
    """The settings of a run that is named by its YAML, its folder or its URL.

    A folder that was moved is read where it is now. Of a search the best trial counts. Raises
    ConfigError if there is no run.
    """
    named = fspath(place).rstrip("/")
    if is_yaml(named) or not (is_url(named) or _is_folder(named)):
        if not (is_yaml(named) or Path(named).is_file()):
            raise ConfigError(f"{named}: no run is there; name a run's folder or URL, or its YAML")
        return load_config(file_at(named), overrides)
    if not holds(named, RESULT_FILE) and (best := _best_trial(named)) is not None:
        named = best
    return kept_config(named, overrides)


def is_yaml(named: str) -> bool:
    """Whether a user names a YAML, not a folder."""
    return named.lower().endswith(_YAML) and not _is_folder(named)


def _is_folder(named: str) -> bool:
    return not is_url(named) and local_path(named).is_dir() and named != ""


def kept_config(named: str, overrides: Iterable[str] = ()) -> RunConfig:
    """The settings that a run or a search keeps in its folder, with the place that it has now.

    Raises ConfigError if there are none.
    """
    if not holds(named, CONFIG_FILE):
        raise ConfigError(f"{named}: no {CONFIG_FILE} in it; name the folder of a run, or its YAML")
    settings = read_json(local_path(named) / CONFIG_FILE)
    assert settings is not None, "the file is there"
    if _MODELS_OWN in settings:
        raise ConfigError(f"{named}: a model lies there, not a run; name the run's folder or YAML")
    storage, name = _where_it_is(load_config(settings), named)
    return load_config({**settings, "storage": storage, "name": name}, overrides)


def holds(place: str, name: str) -> bool:
    """Whether a folder or URL has a file, which is then on this server, too."""
    path = local_path(place) / name
    storage_at(place).fetch(path)
    return path.is_file()


def _best_trial(place: str) -> str | None:
    """Where the best trial of a search lies; None if there is no search.

    Raises ConfigError for a search that has not ended.
    """
    inner = inside(place, FOLDER)
    folder = next((each for each in (place, inner) if holds(each, SEARCH_FILE)), None)
    if folder is None:
        return None
    search = find_search(folder)
    if search.outcome is None:
        raise ConfigError(f"{folder}: the search has not ended, so it has no best trial yet")
    run = next(each.run for each in search.trials if each.number == search.outcome.best)
    return inside(folder, *run.removeprefix(f"{search.name}/").split("/"))


def _where_it_is(config: RunConfig, place: str) -> tuple[str, str]:
    """The storage and the name that the run's folder has now."""
    here = place if is_url(place) else str(local_path(place).resolve())
    if config.place == here:
        return config.storage, config.name
    if here.endswith(f"/{config.name}"):
        return here.removesuffix(f"/{config.name}"), config.name
    storage, _, name = here.rpartition("/")
    return storage, name
