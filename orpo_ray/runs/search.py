"""What a search has tried and found so far, as `search.json` keeps it: its only memory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

State = Literal["running", "finished", "stopped", "failed"]
"""`stopped`: given up by the scheduler. `running`: or interrupted, and to be gone on with."""
Status = Literal["running", "interrupted", "stopped", "finished"]


@dataclass(kw_only=True)
class Trial:
    """One run of a search: `values` by searched field, an evaluation (`step` and `eval/` numbers)
    after the other.
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
    """Whether a failed trial may come through another time as it is: it lacked room, a disk or its
    process.
    """

    def note(self, step: int, total_steps: int, evaluation: Mapping[str, float]) -> bool:
        """Take in an evaluation; False for a step that is on record, which a resumed run comes to
        again.
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
    """When the command that is at work was given, in seconds since 1970, and the steps that were
    trained by then.
    """

    at: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search that has ended found. `config` and `adapter` are paths or URLs."""

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
    """Lines that say what it means."""


@dataclass(kw_only=True)
class Search:
    """A search as far as it has come. `pairs`: evaluation pairs that every trial is judged by."""

    name: str
    settings: dict[str, Any]
    trial_count: int
    pairs: int
    status: Status = "running"
    trials: list[Trial] = field(default_factory=list)
    outcome: Found | None = None
    began: Start | None = None

    @property
    def metric(self) -> str:
        """What trials are ranked by."""
        metric: str = self.settings["metric"]
        return metric

    def result(self) -> "SearchResult":
        """What it found, now that it has ended."""
        assert self.outcome is not None, "a search that has ended has an outcome"
        return SearchResult(
            **asdict(self.outcome), name=self.name, trials=tuple(self.trials), record=self
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data, as search.json has it."""
        return {**asdict(self), "outcome": {} if self.outcome is None else asdict(self.outcome)}


@dataclass(frozen=True, kw_only=True)
class SearchResult(Found):
    """What a search that has ended found, and its trials."""

    name: str
    trials: tuple[Trial, ...]
    record: Search = field(repr=False)
    """All that search.json keeps."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, as search.json has it."""
        return self.record.to_json()


def _known(kind: type, written: Any) -> dict[str, Any]:
    """What a class has of plain data, of which another version may have written more."""
    if not isinstance(written, Mapping):
        raise TypeError(f"{written!r} is no {kind.__name__}")
    return {entry.name: written[entry.name] for entry in fields(kind) if entry.name in written}


def search_of(written: Mapping[str, Any]) -> Search:
    """The search that plain data tells of.

    Raises TypeError, KeyError or ValueError where it tells of none.
    """
    began, outcome = written.get("began"), written.get("outcome")
    search = Search(
        **{
            **_known(Search, written),
            "trials": [Trial(**_known(Trial, trial)) for trial in written["trials"]],
            "outcome": Found(**_known(Found, outcome)) if outcome else None,
            "began": Start(**_known(Start, began)) if began else None,
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
