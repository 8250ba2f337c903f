"""What a search has tried and found so far, as `search.json` keeps it: its only memory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from orpo_ray.config import RunConfig
from orpo_ray.errors import ConfigError
from orpo_ray.storage import LOCAL, Storage
from orpo_ray.training.record import FREE_KEYS, SEARCH_FILE, read_json, refuse_changed_config, write_json

FOLDER = "search"
"""Where a search lies inside the run that it is a search for, and what its name ends with."""
_FREE_KEYS = (*(key for key in FREE_KEYS if key != "search"), "search.trials")

OUTCOME = {"best", "values", "metrics", "adapter", "config", "pareto", "answers", "trial_steps", "reading"}
"""What the outcome of a search that has ended tells."""

State = Literal["running", "finished", "stopped", "failed"]
"""`stopped`: given up by the scheduler. `running`: or interrupted, and to be gone on with."""


@dataclass
class Trial:
    """One run of a search: `values` by searched field, an evaluation (`step` and `eval/` numbers) after the other."""

    number: int
    run: str
    values: dict[str, Any]
    state: State = "running"
    steps: int = 0
    """Steps trained, up to the last one seen."""
    total_steps: int = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)
    error: str | None = None
    may_pass: bool = False
    """Whether a failed trial may come through another time as it is: it lacked room, a disk or its process."""

    def note(self, step: int, total_steps: int, evaluation: Mapping[str, float]) -> bool:
        """Take in an evaluation; False for a step that is on record, which a resumed run comes to again."""
        self.total_steps = total_steps
        if self.evaluations and step <= self.evaluations[-1]["step"]:
            return False
        self.steps = step
        self.evaluations.append({"step": step, **evaluation})
        return True

    @property
    def last(self) -> dict[str, float]:
        """The latest evaluation; empty before the first."""
        return self.evaluations[-1] if self.evaluations else {}


@dataclass(frozen=True)
class Start:
    """When the command that is at work was given, in seconds since 1970, and the steps that were trained by then."""

    at: float
    steps: int


@dataclass
class Search:
    """A search as far as it has come. `pairs`: evaluation pairs that every trial is judged by."""

    name: str
    settings: dict[str, Any]
    trial_count: int
    pairs: int
    status: Literal["running", "interrupted", "stopped", "finished"] = "running"
    trials: list[Trial] = field(default_factory=list)
    outcome: dict[str, Any] = field(default_factory=dict)
    began: Start | None = None

    @property
    def metric(self) -> str:
        """What trials are ranked by."""
        metric: str = self.settings["metric"]
        return metric

    def write(self, folder: Path, storage: Storage = LOCAL) -> None:
        """Keep it, in one step; `folder` is on this server, `storage` what it is kept in."""
        write_json(folder / SEARCH_FILE, asdict(self))
        storage.store(folder / SEARCH_FILE)


def read_search(folder: Path) -> Search | None:
    """The search of a folder, or None where none has begun. Raises ConfigError for a file that is damaged."""
    found = read_json(folder / SEARCH_FILE)
    if found is None:
        return None
    try:
        return search_of(found)
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{folder / SEARCH_FILE}: not as a search wrote it ({error})") from error


def search_of(written: dict[str, Any]) -> Search:
    """The search that plain data tells of. Raises TypeError, KeyError or ValueError where it tells of none."""
    began = written.get("began")
    search = Search(
        **{
            **written,
            "trials": [Trial(**trial) for trial in written["trials"]],
            "began": Start(**began) if began else None,
        }
    )
    for trial in search.trials:
        whole = isinstance(trial.values, dict) and all("step" in evaluation for evaluation in trial.evaluations)
        if trial.state not in get_args(State) or not whole:
            raise ValueError(f"trial {trial.number}: state {trial.state!r}, values {trial.values!r}")
    if search.outcome and not search.outcome.keys() >= OUTCOME:
        raise ValueError(f"its outcome has {', '.join(search.outcome)} only")
    return search


def finished_search(config: RunConfig) -> Search | None:
    """The search of this name if nothing is left to do. Raises ConfigError where it was made with other settings.

    More trials than it had are something left to do.
    """
    refuse_changed_config(config.run_dir, config, _FREE_KEYS)
    search = read_search(config.run_dir)
    assert config.search is not None, "a search has settings"
    if search is None or search.status != "finished" or len(search.trials) < config.search.trial_count:
        return None
    return search
