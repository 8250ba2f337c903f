"""What a comparison has trained and found so far. `comparison.json` keeps it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from orpo_ray.runs.files import COMPARISON_FILE
from orpo_ray.runs.search import State, Status, known_fields

FILE = COMPARISON_FILE
Word = Literal["better", "worse", "within noise"]


@dataclass(kw_only=True)
class Entry:
    """One run of a method, with one seed. `run` is its name."""

    number: int
    method: str
    seed: int
    run: str
    state: State = "running"
    steps: int = 0
    error: str | None = None
    may_pass: bool = False
    """Whether a failed run may succeed if it is tried again unchanged."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a method reached: means over its seeds, with 95 % intervals over held-out pairs.

    `spread` is the standard deviation over seeds. `broken` is the share of greedy answers that do
    not end, that repeat themselves, or that leave the words of the pairs. Figures are None for a
    method of which no run has finished. `error` says why a run failed.
    """

    method: str
    state: str
    seeds: int = 0
    error: str | None = None
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    margin: float | None = None
    margin_low: float | None = None
    margin_high: float | None = None
    chosen_log_prob: float | None = None
    chosen_low: float | None = None
    chosen_high: float | None = None
    rejected_log_prob: float | None = None
    rejected_low: float | None = None
    rejected_high: float | None = None
    chosen_before: float | None = None
    nll: float | None = None
    nll_low: float | None = None
    nll_high: float | None = None
    win_rate: float | None = None
    win_low: float | None = None
    win_high: float | None = None
    broken: float | None = None
    broken_before: float | None = None
    budget_used: float | None = None
    seconds: float | None = None
    pairs_per_second: float | None = None
    peak_memory_bytes: int | None = None
    device_hours: float | None = None
    spread: dict[str, float] = field(default_factory=dict)
    runs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How `method` stands to `other` by accuracy: the difference with its 95 % interval."""

    method: str
    other: str
    verdict: Word
    difference: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was found with so many training pairs."""

    pairs: int
    methods: tuple[Standing, ...]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The state of a comparison. `pairs`: how many held-out pairs judge every method."""

    name: str
    settings: dict[str, Any]
    budget: dict[str, Any]
    pairs: int
    train_pairs: int
    status: Status = "running"
    entries: list[Entry] = field(default_factory=list)
    methods: tuple[Standing, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    curve: tuple[Point, ...] = ()
    reading: tuple[str, ...] = ()
    report: str | None = None
    """Where its page is."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, as comparison.json has it."""
        return asdict(self)


def comparison_of(written: Mapping[str, Any]) -> Comparison:
    """The comparison that plain data describes. Raises TypeError or KeyError if it is none."""
    return Comparison(
        **{
            **known_fields(Comparison, written),
            "entries": [Entry(**known_fields(Entry, each)) for each in written["entries"]],
            "methods": _standings(written["methods"]),
            "verdicts": _verdicts(written["verdicts"]),
            "curve": tuple(
                Point(
                    pairs=each["pairs"],
                    methods=_standings(each["methods"]),
                    verdicts=_verdicts(each["verdicts"]),
                )
                for each in written["curve"]
            ),
            "reading": tuple(written["reading"]),
        }
    )


def _standings(written: Any) -> tuple[Standing, ...]:
    return tuple(
        Standing(**{**known_fields(Standing, each), "runs": tuple(each["runs"])})
        for each in written
    )


def _verdicts(written: Any) -> tuple[Verdict, ...]:
    return tuple(Verdict(**known_fields(Verdict, each)) for each in written)
