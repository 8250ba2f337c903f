"""What a search has tried and found so far. `search.json` keeps it, and nothing else does."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

State = Literal["running", "finished", "stopped", "failed"]
"""`stopped`: the scheduler gave the trial up.

`running`: the trial runs, or it was interrupted and the next command resumes it.
"""
Status = Literal["running", "interrupted", "stopped", "finished"]
"""`stopped`: on request or by an error. `interrupted`: its process was killed.

The same command resumes both.
"""

_ROUNDING = 1e-9


@dataclass(kw_only=True)
class Trial:
    """One run of a search.

    `values` maps each searched field to its value. An evaluation has its `step` and `eval/`
    numbers.
    """

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
    """Whether a failed trial may succeed if it is tried again unchanged.

    That is so if it lacked memory or disk, or if its process was killed.
    """

    def note(self, step: int, total_steps: int, evaluation: Mapping[str, float]) -> bool:
        """Record an evaluation. Returns False for a step that is on record already.

        A resumed run begins at its last checkpoint, and evaluates the steps after it again.
        """
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
    """When the present command started (seconds since 1970), and the steps trained by then."""

    at: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a finished search found. `config` and `adapter` are paths or URLs."""

    best: int
    """The number of the best trial."""
    values: dict[str, Any]
    """Its searched fields."""
    metrics: dict[str, float]
    """Its last evaluation."""
    adapter: str
    config: str
    """The whole run with the best values, for `train`."""
    pareto: list[dict[str, Any]]
    """Trials that no other one beats in both accuracy and NLL."""
    answers: list[dict[str, str]]
    trial_steps: int
    reading: list[str]
    """Lines that explain the result."""


@dataclass(kw_only=True)
class Search:
    """The present state of a search. `pairs`: how many evaluation pairs judge every trial."""

    name: str
    settings: dict[str, Any]
    trial_count: int
    pairs: int
    status: Status = "running"
    trials: list[Trial] = field(default_factory=list)
    outcome: Found | None = None
    began: Start | None = None
    report: str | None = None
    """The path or URL of the page that shows the search; None if there is none yet."""

    @property
    def metric(self) -> str:
        """What trials are ranked by."""
        metric: str = self.settings["metric"]
        return metric

    def result(self) -> "SearchResult":
        """The result of a finished search."""
        assert self.outcome is not None, "a finished search has an outcome"
        return SearchResult(
            **asdict(self.outcome), name=self.name, trials=tuple(self.trials), record=self
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, as search.json has it."""
        return {**asdict(self), "outcome": {} if self.outcome is None else asdict(self.outcome)}


@dataclass(frozen=True, kw_only=True)
class SearchResult(Found):
    """What a finished search found, and its trials."""

    name: str
    trials: tuple[Trial, ...]
    record: Search = field(repr=False)
    """All that search.json keeps."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, as search.json has it."""
        return self.record.to_json()


def rungs(grace: float, eta: int) -> list[float]:
    """The shares of a run at which ASHA compares its trials.

    The first is `grace`. Each further one is at `eta` times the one before.
    """
    shares: list[float] = []
    while (share := grace * eta ** len(shares)) < 1 - _ROUNDING:
        shares.append(share)
    return shares


def known_fields(kind: type, written: Any) -> dict[str, Any]:
    """The entries that are fields of a class; another version may have written more."""
    if not isinstance(written, Mapping):
        raise TypeError(f"{written!r} is no {kind.__name__}")
    return {entry.name: written[entry.name] for entry in fields(kind) if entry.name in written}


def search_of(written: Mapping[str, Any]) -> Search:
    """The search that plain data describes.

    Raises TypeError, KeyError or ValueError if it describes none.
    """
    began, outcome = written.get("began"), written.get("outcome")
    search = Search(
        **{
            **known_fields(Search, written),
            "trials": [Trial(**known_fields(Trial, trial)) for trial in written["trials"]],
            "outcome": Found(**known_fields(Found, outcome)) if outcome else None,
            "began": Start(**known_fields(Start, began)) if began else None,
        }
    )
    for trial in search.trials:
        whole = isinstance(trial.values, dict) and all(
            "step" in evaluation for evaluation in trial.evaluations
        )
        if trial.state not in get_args(State) or not whole:
            raise ValueError(
                f"trial {trial.number}: state {trial.state!r}, values {trial.values!r}"
            )
    return search
