"""A search on disk: a folder inside its run."""

from pathlib import Path
from typing import ClassVar

from orpo_ray.config import RunConfig
from orpo_ray.config.searched import trial_count
from orpo_ray.config.storage import local_path
from orpo_ray.errors import ConfigError
from orpo_ray.runs.changes import FREE_KEYS
from orpo_ray.runs.files import SEARCH_FILE, read_json, write_json
from orpo_ray.runs.lock import RUN_LOCK_FILE, is_locked
from orpo_ray.runs.run import Run, RunFolder
from orpo_ray.runs.search import Search, Trial, search_of
from orpo_ray.storage import storage_at

FOLDER = "search"
"""The folder of a search inside its run. The name of a search ends with it."""


_FIXED = ("search", "training.eval_every")
"""Settings that may change in a run, but not in a search.

All trials of a search must be judged at the same points.
"""


class SearchRun(RunFolder[Search]):
    """A search on disk. Its trials are runs inside its folder."""

    free_keys: ClassVar = (*(key for key in FREE_KEYS if key not in _FIXED), "search.trials")

    def what_next(self) -> str:
        """What a user can do with it when it is finished."""
        return "give another name to search again, or more search.trials"

    def finished(self) -> Search | None:
        """The search, if it has ended with an outcome.

        It is not finished if the settings now ask for more trials than it had.
        """
        search = self.search()
        if search is None or search.status != "finished" or search.outcome is None:
            return None
        return search if len(search.trials) >= trial_count(self.config) else None

    def search(self) -> Search | None:
        """What has been tried so far, or None if no search has begun.

        Raises ConfigError for a file that is damaged.
        """
        return _read_search(self.folder)

    def keep(self, search: Search) -> None:
        """Write and store search.json."""
        write_json(self.path(SEARCH_FILE), search.to_json())
        self.store(SEARCH_FILE)

    def trial_run(self, trial: Trial) -> Run:
        """The files of a trial. The config is the search's, without the values of the trial."""
        return Run(self.config.model_copy(update={"name": trial.run}))


def find_search(place: str) -> Search:
    """The search at a place: the folder or URL of the search, or of its run.

    Raises ConfigError if there is no search.
    """
    folder, storage = local_path(place), storage_at(place)
    for candidate in (folder / FOLDER, folder):
        at_work = is_locked(candidate / RUN_LOCK_FILE)
        if storage.is_remote and not at_work:
            storage.fetch(candidate / SEARCH_FILE)
        if candidate.is_dir() and (found := _read_search(candidate)) is not None:
            # If the search is in a bucket, this server cannot see the lock of another server.
            if found.status == "running" and not storage.is_remote and not at_work:
                found.status = "interrupted"  # its process was killed: the same command resumes it
            return found
    usual = Path(RunConfig.model_fields["storage"].default) / place
    has_search = any((at / SEARCH_FILE).is_file() for at in (usual / FOLDER, usual))
    hint = f"did you mean {usual}?" if has_search else "name the folder of a run, such as runs/x"
    raise ConfigError(f"{place}: no {SEARCH_FILE} here or in its folder {FOLDER}/; {hint}")


def _read_search(folder: Path) -> Search | None:
    written = read_json(folder / SEARCH_FILE)
    if written is None:
        return None
    try:
        return search_of(written)
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{folder / SEARCH_FILE}: not as a search wrote it ({error})") from error


def search_for(config: RunConfig) -> SearchRun:
    """The search of a run. It lies in the run's folder."""
    return SearchRun(config.model_copy(update={"name": f"{config.name}/{FOLDER}"}))
