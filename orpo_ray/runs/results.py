"""Results of commands, as frozen values. The command line prints their `to_json`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

ORIGINAL, DEQUANTISED, NO_MERGE = "original", "dequantised", "none"
"""What an adapter was merged into: its base as published, or as it was held in training.

Nothing is merged for an adapter alone, and for a model that was trained whole.
"""

_UNKNOWN_BEFORE: Mapping[str, Any] = {
    "layout": None,
    "adapter_step": None,
    "start": {},
    "changes": {},
    "eval_pairs": None,
    "remarks": (),
    "seconds": None,
    "peak_memory_bytes": None,
}
"""Values for fields that results of older versions lack."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of a finished run, as in result.json. `adapter` is a path or an s3:// URL."""

    name: str
    steps: int
    adapter: str
    adapter_step: int | None
    """The step whose checkpoint became the adapter; None in a result of an older version."""
    metrics: dict[str, float]
    """The latest number of each metric. `eval/` numbers are those of the adapter."""
    start: dict[str, float]
    """The evaluation before the first step."""
    changes: dict[str, Any]
    """For each mean over held-out pairs: `before`, `after` and `difference`.

    Each has `value`, `low` and `high`; the last two are a 95 % interval. The accuracy also has
    `chance`: how probable such a change is by chance.
    """
    eval_pairs: int | None
    """How many held-out pairs the changes were measured on."""
    remarks: tuple[str, ...]
    """What was learnt and what was not, in words."""
    seconds: float | None
    """Time of training, over all processes that resumed the run."""
    peak_memory_bytes: int | None
    """The most memory that one worker used, of its GPU or of the machine."""
    pairs_per_second: float | None
    """Pairs a second while steps are trained; None if no step is on record."""
    workers: tuple[int, ...]
    """The process ids of the workers."""
    strategy: str
    layout: str | None
    """None in a result of an older version."""
    versions: dict[str, str]
    stages: tuple["TrainResult", ...] = ()
    """The results of the stages, in order; empty for a run without stages."""
    report: str | None = None
    """The path or URL of the page that shows the run; None if it could not be written."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, as result.json has it."""
        lists = {"workers": list(self.workers), "remarks": list(self.remarks)}
        plain = {"status": "finished", **asdict(self), **lists}
        del plain["stages"]
        if self.stages:
            plain["stages"] = [stage.to_json() for stage in self.stages]
        return plain

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> Self:
        """The result that `to_json` wrote. Keys that this version does not know are ignored.

        Raises TypeError, KeyError or AttributeError for anything else.
        """
        plain = {entry.name: written[entry.name] for entry in fields(cls) if entry.name in written}
        stages = tuple(cls.from_json(stage) for stage in written.get("stages", ()))
        known = {**_UNKNOWN_BEFORE, **plain}
        lists = {name: tuple(known[name]) for name in ("workers", "remarks")}
        return cls(**{**known, **lists, "stages": stages})


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt, and the greedy answers of both models.

    An answer is cut if it reached the limit of its length before it ended.
    """

    prompt: str
    base: str
    base_is_cut: bool = False
    trained: str | None
    """None if the base alone was judged."""
    trained_is_cut: bool = False


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A file of answers. `cut` of them reached a limit before they ended."""

    file: str
    model: str
    answers: int
    cut: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """How much a model that was written behaves like the one that was trained.

    `max_log_prob_difference` is the largest over all answers of the held-out pairs, per token.
    `accuracy` is the written model's; None if no pair can be compared. `greedy_agreement` is the
    share of greedy answers that are the same, token by token; None if nothing was asked.
    """

    max_log_prob_difference: float
    accuracy: float | None
    greedy_agreement: float | None


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A folder that other programs load, and how it was compared with the trained model."""

    run: str
    """The name of the run, or of the adapter that was named in its place."""
    folder: str
    merge: str
    """`original` or `dequantised`: the base that the adapter was merged into; `none` without."""
    candidates: dict[str, Likeness] = field(default_factory=dict)
    """By the same names: what was written to choose from."""
    reloaded: Likeness
    """The folder as other programs load it."""
    merge_error: float
    """The largest difference per token from the unmerged adapter on the same weights of the base.

    For the original weights under an adapter that was trained on quantised ones, `reloaded` is
    larger than this by what the quantisation changed.
    """
    tolerance: float
    """The largest `merge_error` that rounding explains."""
    pairs: int
    greedy_answers: int

    def to_json(self) -> dict[str, Any]:
        """Plain data. export.json has it without the folder, which may be moved."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """How often a judge finds the answers of A better than those of B."""

    a: str
    b: str
    """The files of the answers; if both are in one, the model as well."""
    judge: str
    file: str
    """Where the verdicts are kept, one on each line."""
    rows: int
    """All rows: wins, losses, ties and unreadable ones."""
    identical: int
    """Rows with the same answer twice. They are ties."""
    wins: int
    losses: int
    ties: int
    disagreements: int
    """Rows on which the two orders did not agree. They are ties."""
    unreadable: int
    """Rows without a verdict. They are in no rate."""
    win_rate: float
    """The share of wins, ties as one half, from 0 to 1."""
    low: float
    high: float
    """The 95 % interval of `win_rate`."""
    length_controlled: float
    """The win rate that is left for answers of equal length."""
    length_controlled_low: float
    length_controlled_high: float
    a_length: float
    b_length: float
    """The mean length of an answer, in characters."""
    requests: int
    """Requests to the endpoint, those of earlier commands for the same file included."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The base compared with the model that a run trained, or the base alone."""

    name: str
    adapter: str | None
    """The path or URL of what was compared with the base; None if the base alone was judged."""
    metrics: dict[str, dict[str, dict[str, float]]]
    """For `base` and `trained`: metrics by source of the pairs, `all` first."""
    changes: dict[str, Any] = field(default_factory=dict)
    """As in TrainResult; empty if the base alone was judged."""
    base: dict[str, Any] = field(default_factory=dict)
    """Each mean of a base that was judged alone: `value`, `low` and `high`."""
    remarks: tuple[str, ...] = ()
    """What was learnt and what was not, in words."""
    quantized_modules: int
    samples: tuple[Sample, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        samples = [asdict(sample) for sample in self.samples]
        return {**asdict(self), "remarks": list(self.remarks), "samples": samples}


@dataclass(frozen=True, kw_only=True)
class Benchmarks:
    """What lm-evaluation-harness found for a base and for the model that a run trained."""

    name: str
    models: dict[str, dict[str, Any]]
    """For `base` and `trained`: what was loaded, and how."""
    metrics: dict[str, dict[str, dict[str, dict[str, float | None]]]]
    """For the same: by task and metric, as lm-eval calls them, `value` and `stderr`."""
    settings: dict[str, Any]
    """What else the numbers depend on: of the tasks, of lm-eval, and versions of software."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """What `train` would do: the steps of a run, and what was decided.

    For a run in stages, the plan of each stage.
    """

    name: str
    steps: int
    pairs: int = 0
    eval_pairs: int = 0
    artifact: str = ""
    """The path or URL of the prepared pairs."""
    workers: int = 0
    decisions: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple["TrainPlan", ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data. A run in stages has only name, steps and stages."""
        if self.stages:
            return {
                "name": self.name,
                "steps": self.steps,
                "stages": [stage.to_json() for stage in self.stages],
            }
        plain = asdict(self)
        del plain["stages"]
        return plain


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """What `tune` would do: how many trials, how many at once, and over which ranges.

    `trial` is the plan of one trial.
    """

    name: str
    trials: int
    at_once: int
    trial: TrainPlan
    space: Mapping[str, Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        own = {
            "name": self.name,
            "trials": self.trials,
            "at_once": self.at_once,
            "space": dict(self.space),
        }
        return {**self.trial.to_json(), **own}
