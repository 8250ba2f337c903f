"""What a search found, in numbers and in words: the best trial, and its cost in likelihood.

All functions are pure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orpo_ray.config.search import ACCURACY
from orpo_ray.config.space import Span, parse_domain
from orpo_ray.runs.scores import Change, are_few, too_few
from orpo_ray.runs.search import Search, Trial
from orpo_ray.search.score import MARGIN, score

NLL = "eval/nll"
_NOTICED_NATS = 0.01
"""A smaller difference in NLL is not mentioned."""
_EDGE = 0.05
"""A value is at the end of its range if it is within this share of the range's width."""


@dataclass(frozen=True)
class Compared:
    """The best trial compared with trial 0, the given configuration, after the same step."""

    metric: str
    change: Change
    step: int


def best_trial(search: Search) -> Trial | None:
    """The best of the trials that finished, by the last evaluation; None if none finished."""
    finished = _finished(search.trials)
    return max(
        finished, key=lambda trial: score(search.metric, trial.last, search.pairs), default=None
    )


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Finished trials that no other trial beats in both accuracy and NLL.

    The best accuracy comes first. If two are equal in both, the one with the larger margin is
    taken.
    """
    front: list[Trial] = []
    by_accuracy = sorted(
        _finished(trials), key=lambda t: (-t.last[ACCURACY], t.last[NLL], -t.last[MARGIN])
    )
    for trial in by_accuracy:
        if not front or trial.last[NLL] < front[-1].last[NLL]:
            front.append(trial)
    return front


def trial_steps(trials: Sequence[Trial]) -> int:
    """The optimizer steps of all trials together."""
    return sum(trial.steps for trial in trials)


def reading(search: Search, compared: Compared | None = None) -> list[str]:
    """Lines for a first-time reader: which trial won, what it cost, what to do next.

    `compared` is None if the best trial cannot be compared with the given configuration.
    """
    best, front = best_trial(search), pareto_front(search.trials)
    assert best is not None, "a search without a finished trial has nothing to read"
    counts = {
        state: sum(t.state == state for t in search.trials)
        for state in ("finished", "stopped", "failed")
    }
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    whole = max(search.trial_count, len(search.trials)) * best.total_steps
    return [
        f"Trial {best.number} is best, with {shown_values(best.values)}. It prefers the chosen "
        f"answer for {best.last[ACCURACY]:.1%} of {search.pairs} held-out pairs. Its mean margin "
        f"is {best.last[MARGIN]:.2f} nats a token.",
        f"{len(search.trials)} trials: {counts['finished']} finished, {counts['stopped']} given up "
        f"early{failed}. They took {trial_steps(search.trials)} steps; training "
        f"every trial to its end would take {whole}.",
        _price(front, best)
        + " Read the answers before the numbers; then train best.yaml with more data or steps.",
        *_against_given(search, best, compared),
        *_edges(search, best),
    ]


def _against_given(search: Search, best: Trial, compared: Compared | None) -> list[str]:
    """Whether the search beat the configuration that it was given."""
    if not search.settings.get("try_given"):
        return []
    if best.number == 0:
        few = f" {too_few(search.pairs)}" if are_few(search.pairs) else ""
        return [
            "No trial is better than the given configuration (trial 0): the search changes "
            f"nothing.{few}"
        ]
    if compared is None:
        return []
    change, name = compared.change, compared.metric.removeprefix("eval/")
    gain = change.difference
    comparison = (
        f"At step {compared.step} the best trial has {name} {change.after.value:.3f}, and the "
        f"given configuration (trial 0) has {change.before.value:.3f}. The difference is "
        f"{gain.value:+.3f} (95 % interval {gain.low:+.3f} to {gain.high:+.3f})"
    )
    if not change.is_noise:
        return [f"{comparison}, more than the noise of {search.pairs} held-out pairs."]
    return [f"{comparison}, within the noise. {too_few(search.pairs)}"]


def _edges(search: Search, best: Trial) -> list[str]:
    """The best values that lie at an end of their range, with the range to try next."""
    if best.number == 0 and search.settings.get("try_given"):
        return []  # the ranges may have been widened just to hold its values
    lines = []
    for name, text in search.settings.get("space", {}).items():
        domain, value = parse_domain(text), best.values.get(name)
        if not isinstance(domain, Span) or not isinstance(value, int | float):
            continue
        end = _end_of(domain, value)
        if end is not None:
            low, high = _around(domain, value)
            lines.append(
                f"{name}={value:.3g} is at the {end} end of its range, {domain.low:g} to "
                f"{domain.high:g}. A better value may lie outside. Search {low:g} to {high:g} next."
            )
    return lines


def _end_of(domain: Span, value: float) -> str | None:
    """`lower` or `upper` if the value is at that end of its range, else None."""
    if value <= 0 and domain.log:
        return "lower"
    share = domain.share(value)
    if share <= _EDGE:
        return "lower"
    return "upper" if share >= 1 - _EDGE else None


def _around(domain: Span, value: float) -> tuple[float, float]:
    """A range of the same width around the value, rounded to two digits.

    It never begins below 0, because no number of a config is negative.
    """
    if domain.log:
        factor = math.exp(_width(domain) / 2)
        middle = value if value > 0 else domain.low
        ends = (middle / factor, middle * factor)
    else:
        ends = (max(0.0, value - _width(domain) / 2), value + _width(domain) / 2)
    return float(f"{ends[0]:.2g}"), float(f"{ends[1]:.2g}")


def _scaled(domain: Span, value: float) -> float:
    return math.log(value) if domain.log else value


def _width(domain: Span) -> float:
    return _scaled(domain, domain.high) - _scaled(domain, domain.low)


def _price(front: list[Trial], best: Trial) -> str:
    """What the accuracy cost in likelihood of the chosen answers."""
    gentle = front[-1]
    if best.last[NLL] - gentle.last[NLL] < _NOTICED_NATS:
        return "No other finished trial keeps the chosen answers noticeably likelier."
    return (
        f"Trial {gentle.number} keeps the chosen answers likelier (NLL {gentle.last[NLL]:.2f} "
        f"compared with {best.last[NLL]:.2f} a token) at accuracy {gentle.last[ACCURACY]:.1%}."
    )


def shown_values(values: dict[str, Any]) -> str:
    """Searched values on one line, with short numbers."""
    return ", ".join(f"{name}={_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else " ".join(str(value).split())


def _finished(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that were trained to the end and whose last numbers are finite."""
    needed = (ACCURACY, MARGIN, NLL)
    return [
        t
        for t in trials
        if t.state == "finished" and all(t.last[name] is not None for name in needed)
    ]
