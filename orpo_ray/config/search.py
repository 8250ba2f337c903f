"""What a search varies, how it chooses trials, and when it gives one up. Only `tune` reads it."""

from difflib import get_close_matches
from math import prod
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from orpo_ray.config.foreign.words import word_of
from orpo_ray.config.near import near_name
from orpo_ray.config.section import Section
from orpo_ray.config.space import Domain, Options, near_form, parse_domain

ACCURACY = "eval/accuracy"
METRICS = {
    ACCURACY: "max",
    "eval/margin": "max",
    "eval/log_odds_ratio": "max",
    "eval/chosen_logp": "max",
    "eval/nll": "min",
}
"""What a search may rank trials by, and which way is better.

No setting of a loss scales any of them, so trials with other settings stay comparable.
"""

TRIALS = 16
_LARGEST_GRID = 10_000
_PAIRS_STAY = "the pairs are prepared once, for all trials"
_SAME_POINTS = "all trials are judged at the same points of a run"
_NOT_SEARCHED = {
    "name": "every trial has a name of its own",
    "storage": "all trials share one",
    "search": "it describes the search itself",
    "compare": "it describes a comparison of methods",
    "stages": "name a field of one stage, such as stages.1.objective.beta",
    "scale": "it decides who does the work, not what is trained",
    "data": _PAIRS_STAY,
    "model.base": _PAIRS_STAY,
    "model.revision": _PAIRS_STAY,
    "model.chat_template": _PAIRS_STAY,
    "training.seed": "the best seed is luck, not a better setting",
    "training.eval_every": _SAME_POINTS,
    "training.tokens_per_microbatch": "it changes speed and memory",
    "training.memory_limit": "it changes speed and memory",
    "training.gradient_checkpointing": "it changes speed and memory",
    "training.layout": "it changes speed and memory",
    "training.engine": "it decides which code computes the loss, not the objective",
    "training.checkpoint_every": "it changes no result",
    "training.keep": "it changes no result",
    "training.trackers": "it changes no result",
}


class SearchConfig(Section):
    """What to vary, and how to search it.

    `search: {trials: 16}` alone takes ranges that suit the objective.
    """

    space: dict[str, Any] = Field(
        default_factory=dict,
        description="field: {uniform | loguniform: [low, high]}, "
        "{quniform | qloguniform: [low, high, step]} or {choice | grid: [values]}",
    )
    trials: PositiveInt | None = Field(None, description=f"{TRIALS} unless the grid says how many")
    try_given: bool = Field(
        True,
        description="trial 0 is the given configuration; a grid without it gets one more trial",
    )
    metric: str = Field(
        ACCURACY, description=f"one of {', '.join(METRICS)}; ties of accuracy go by eval/margin"
    )
    searcher: Literal["gp", "random", "grid"] = Field(
        "gp",
        description="gp and random begin with points spread over the ranges; after four trials "
        "have ended, gp (a Gaussian process) draws where a better one is likely",
    )
    scheduler: Literal["asha", "none"] = Field(
        "asha", description="asha gives up trials that are behind"
    )
    grace: float = Field(
        0.2, gt=0, le=1, description="share of a run after which a trial may be given up"
    )
    eta: int = Field(
        3,
        ge=2,
        description="the best 1/eta of the trials that reach grace continue; the same rule applies "
        "again at eta times grace",
    )

    @property
    def domains(self) -> dict[str, Domain]:
        """The parsed range of each searched field."""
        return {name: parse_domain(written) for name, written in self.space.items()}

    @field_validator("space", mode="before")
    @classmethod
    def _nested_fields_are_dotted(cls, space: Any) -> Any:
        """On the command line the dots of `search.space.objective.lambda={...}` make sections."""
        return _dotted(space) if isinstance(space, dict) else space

    @field_validator("space")
    @classmethod
    def _each_range_is_one(cls, space: dict[str, Any]) -> dict[str, Any]:
        for name, written in space.items():
            try:
                parse_domain(written)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return space

    @field_validator("metric")
    @classmethod
    def _metric_means_the_same_everywhere(cls, metric: str) -> str:
        if metric not in METRICS:
            raise ValueError(_refusal_of_metric(metric))
        return metric

    @field_validator("scheduler", mode="before")
    @classmethod
    def _no_pbt(cls, scheduler: Any) -> Any:
        if str(scheduler).lower() in ("pbt", "pb2"):
            raise ValueError(
                f"{scheduler} copies the checkpoint of a better trial into a worse one, and Ray "
                "Tune skips that without an error if a trial is a Ray Train run; use asha or none"
            )
        return scheduler

    @model_validator(mode="after")
    def _a_grid_is_all_grid(self) -> Self:
        domains = self.domains.values()
        if self.searcher == "grid":
            if not domains or any(not isinstance(domain, Options) for domain in domains):
                raise ValueError(
                    "searcher: grid tries every combination; give each field of space {grid: "
                    "[values]}"
                )
            points = prod(len(domain.values) for domain in domains if isinstance(domain, Options))
            if self.trials is not None and self.trials != points:
                raise ValueError(
                    f"trials: the grid has {points} points, not {self.trials}; remove trials"
                )
            if points > _LARGEST_GRID:
                raise ValueError(
                    f"space: the grid has {points} points; {_LARGEST_GRID} is the most"
                )
        elif any(isinstance(domain, Options) and domain.is_grid for domain in domains):
            raise ValueError(
                f"space: grid is for searcher: grid; {self.searcher} draws from {{choice: "
                f"[values]}}"
            )
        return self


def _dotted(space: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, content in space.items():
        if isinstance(content, dict) and content and not any(near_form(name) for name in content):
            fields |= _dotted(content, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = content
    return fields


def _refusal_of_metric(metric: str) -> str:
    """Why a search cannot rank trials by a metric, and which metric to use instead."""
    bare = metric.rpartition("/")[2]
    if "loss" in bare or "preference" in bare:
        return (
            f"{metric} is scaled by lambda or beta: the smallest weight would win; use {ACCURACY}"
        )
    if "reward" in metric:
        return (
            f"{metric} is the margin times beta: the largest beta would win; use {ACCURACY} or "
            "eval/margin"
        )
    near = get_close_matches(metric, METRICS, n=1, cutoff=0.5) or [
        m for m in METRICS if m.endswith(f"/{bare}")
    ]
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(METRICS)}"
    return f"{metric} is not a metric of a search; {hint}"


def refuse_field(field: str, known: list[str], stage: str = "") -> str | None:
    """Why a dotted field cannot be searched, or None if it can.

    `known`: all keys of a config. `stage`: what stands before a field of a stage, such as
    `stages.1.`.
    """
    for fixed, reason in _NOT_SEARCHED.items():
        if field == fixed or (fixed != "stages" and field.startswith(f"{fixed}.")):
            return f"{stage}{field} is not searched: {reason}"
        if fixed.startswith(f"{field}."):
            return (
                f"{stage}{field} holds {fixed}, which is not searched: {reason}; name a field "
                f"of {stage}{field}"
            )
    if field in known:
        return None
    meant = _meant_field(field, known)
    return f"{stage}{field}: unknown field" + (f"; did you mean {stage}{meant}?" if meant else "")


def _meant_field(field: str, known: list[str]) -> str | None:
    """The field that was meant.

    It is misspelt, has this name in another project, or belongs to another section.
    """
    section, _, name = field.rpartition(".")
    same_section = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
    near = near_name(name, same_section)
    if near is not None:
        return f"{section}.{near}".lstrip(".")
    word = word_of(section, name, "")
    if word is not None and word.here in known:
        return word.here
    return next((key for key in known if key.rpartition(".")[2] == name), None)
