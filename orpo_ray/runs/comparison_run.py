"""A comparison on disk: a folder inside its run, which holds the runs of its methods."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from orpo_ray.config import RunConfig, dump
from orpo_ray.config.compare import THEN, CompareConfig
from orpo_ray.config.contenders import FOLDER, settings_of
from orpo_ray.config.storage import local_path
from orpo_ray.errors import ConfigError
from orpo_ray.runs.changes import FREE_KEYS, refuse_changed_config
from orpo_ray.runs.comparison import FILE, Comparison, comparison_of
from orpo_ray.runs.files import CONFIG_FILE, read_json, write_json
from orpo_ray.runs.lock import RUN_LOCK_FILE, is_locked
from orpo_ray.runs.run import RunFolder
from orpo_ray.storage import storage_at


class ComparisonRun(RunFolder[Comparison]):
    """A comparison on disk."""

    free_keys: ClassVar = (
        *(key for key in FREE_KEYS if key not in ("compare", "training.eval_every")),
        "compare.methods",
        "compare.seeds",
        "compare.answers",
        "compare.judge",
    )
    records: ClassVar = (*RunFolder.records, FILE)

    def what_next(self) -> str:
        """What a user can do with it when it is finished."""
        return "give another name to compare again, or more methods or seeds"

    def refuse_changes(self) -> None:
        """Raise ConfigError if it has started with other settings.

        Settings of a method that is new, or that is left out, may come and go.
        """
        stored = read_json(self.path(CONFIG_FILE))
        if stored is None or not self.has_started:
            return
        now = settings_of(self.config)
        # A config without the section compared with the defaults.
        stored = {**stored, "compare": stored.get("compare") or dump(CompareConfig())}
        before = stored["compare"]
        names = before["settings"].keys() | now.settings.keys()
        kept = _parts(before["methods"]) & _parts(now.methods)
        free = (f"compare.settings.{name}." for name in names - kept)
        refuse_changed_config(stored, self.config, (*self.free_keys, *free))

    @property
    def has_started(self) -> bool:
        """Whether a run of it is on record."""
        return self.path(FILE).exists()

    def finished(self) -> None:
        """Nothing: `compare` itself looks for what is left to do."""
        return

    def comparison(self) -> Comparison | None:
        """What has been trained so far, or None if nothing has begun.

        Raises ConfigError for a file that is damaged.
        """
        return _read(self.folder)

    def keep(self, comparison: Comparison) -> None:
        """Write and store comparison.json."""
        write_json(self.path(FILE), comparison.to_json())
        self.store(FILE)


def _parts(methods: Iterable[str]) -> set[str]:
    """The names that methods have in them, each stage's its own."""
    return {part for method in methods for part in method.split(THEN)}


def comparison_for(config: RunConfig) -> ComparisonRun:
    """The comparison of a run. It lies in the run's folder."""
    changes = {"name": f"{config.name}/{FOLDER}", "compare": settings_of(config)}
    return ComparisonRun(config.model_copy(update=changes))


def find_comparison(place: str) -> Comparison:
    """The comparison at a place: its folder or URL, or that of its run.

    Raises ConfigError if there is none.
    """
    folder, storage = local_path(place), storage_at(place)
    for candidate in (folder / FOLDER, folder):
        at_work = is_locked(candidate / RUN_LOCK_FILE)
        if storage.is_remote and not at_work:
            storage.fetch(candidate / FILE)
        if candidate.is_dir() and (found := _read(candidate)) is not None:
            if found.status == "running" and not storage.is_remote and not at_work:
                return replace(found, status="interrupted")
            return found
    raise ConfigError(
        f"{place}: no {FILE} here or in its folder {FOLDER}/; name the folder of a run"
    )


def _read(folder: Path) -> Comparison | None:
    written = read_json(folder / FILE)
    if written is None:
        return None
    try:
        return comparison_of(written)
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{folder / FILE}: not as a comparison wrote it ({error})") from error
