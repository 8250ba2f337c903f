"""What a user names to look at: a run, a search, or a comparison of methods."""

from collections.abc import Iterable
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from orpo_ray.config import load_config
from orpo_ray.config.contenders import FOLDER as COMPARED
from orpo_ray.config.storage import inside, is_url, local_path
from orpo_ray.runs.files import COMPARISON_FILE, RESULT_FILE, SEARCH_FILE, read_json
from orpo_ray.runs.named import holds, is_yaml, kept_config, named_config
from orpo_ray.runs.run import Run
from orpo_ray.runs.search_run import FOLDER, SearchRun
from orpo_ray.storage import file_at, storage_at


class ComparisonFolder:
    """A comparison of methods on disk, to be read."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.storage = storage_at(place)

    def path(self, name: str) -> Path:
        """The path of one of its files on this server."""
        return local_path(self.place) / name

    def place_of(self, name: str) -> str:
        """Where a reader on another server finds one of its files."""
        return inside(self.place, name)

    def store(self, *names: str) -> None:
        """Store those of its files that exist."""
        self.storage.store(*map(self.path, names))

    def record(self) -> dict[str, Any]:
        """What comparison.json says."""
        self.storage.fetch(self.path(COMPARISON_FILE))
        return read_json(self.path(COMPARISON_FILE)) or {}

    def run(self, within: str) -> Run:
        """The run at this path inside of the folder."""
        return Run(named_config(inside(self.place, within)))


Shown = Run | SearchRun | ComparisonFolder


def named_shown(place: str | PathLike[str], overrides: Iterable[str] = ()) -> Shown:
    """What a place holds: a comparison, else a run, else a search.

    The place is a YAML, or the folder or URL of what it names. A search in a run's folder counts
    if the run itself has no result. Raises ConfigError if there is none of them.
    """
    named = fspath(place).rstrip("/")
    at = named
    if is_yaml(named):
        at = load_config(file_at(named), overrides).place
    if is_url(at) or local_path(at).is_dir():
        for folder in (at, inside(at, COMPARED)):
            if holds(folder, COMPARISON_FILE):
                return ComparisonFolder(folder)
        for folder in (at, inside(at, FOLDER)):
            if not holds(at, RESULT_FILE) and holds(folder, SEARCH_FILE):
                return SearchRun(kept_config(folder))
    return Run(named_config(named, overrides))
