"""What methods reached, and which differences are more than noise. All functions are pure.

Intervals are percentile bootstraps over held-out pairs, as in `runs/scores.py`. For the difference
of two methods, seeds are drawn again, too: another seed is another result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

from orpo_ray.runs.comparison import Verdict, Word
from orpo_ray.runs.scores import PairScores, intervals, mean_of
from orpo_ray.search.greedy import Told

_DRAWS, _SEED = 2000, 22
_TAILS = (2.5, 97.5)
Numbers = NDArray[np.float64]
_FIGURES = (
    ("margin", "margin", "margin"),
    ("chosen_logp", "chosen_log_prob", "chosen"),
    ("rejected_logp", "rejected_log_prob", "rejected"),
    ("nll", "nll", "nll"),
)
"""Means with their names in scores and in a Standing, and what the ends of their intervals begin
with there."""


def columns(scores: Sequence[PairScores]) -> dict[str, Numbers]:
    """Numbers of each seed and pair, [seeds, pairs], under the names of a Standing."""
    found: dict[str, list[Numbers]] = {}
    for one in scores:
        chosen, rejected = one.chosen / one.chosen_tokens, one.rejected / one.rejected_tokens
        for name, values in (
            ("accuracy", (chosen > rejected).astype(np.float64)),
            ("margin", chosen - rejected),
            ("chosen_log_prob", chosen),
            ("rejected_log_prob", rejected),
        ):
            found.setdefault(name, []).append(values)
    return {name: np.stack(values) for name, values in found.items()}


def figures(scores: Sequence[PairScores]) -> dict[str, float]:
    """The means of a method over its seeds, with their intervals over held-out pairs."""
    right = mean_of(columns(scores)["accuracy"].mean(axis=0), is_share=True)
    found = {"accuracy": right.value, "low": right.low, "high": right.high}
    means = intervals(_average(scores))
    for metric, name, ends in _FIGURES:
        mean = means[metric]
        found |= {name: mean.value, f"{ends}_low": mean.low, f"{ends}_high": mean.high}
    return found


def _average(scores: Sequence[PairScores]) -> PairScores:
    """The log-probs of each pair as their means over seeds; all seeds have the same tokens."""
    one = scores[0]
    chosen, rejected = (
        np.mean([getattr(each, side) for each in scores], axis=0) for side in ("chosen", "rejected")
    )
    return replace(one, chosen=chosen, rejected=rejected)


def figures_of_answers(answers: Sequence[Told]) -> dict[str, float]:
    """The share of broken answers and the win rate, over all seeds; what is not known is left out.

    An answer's points are the mean over the seeds whose verdict on it can be read.
    """
    if not answers:
        return {}
    found = {
        "broken": fmean(each.broken for each in answers),
        "broken_before": answers[0].broken_before,
    }
    points = np.array([each.wins for each in answers if each.wins])
    readable = points[:, ~np.isnan(points).all(axis=0)] if points.size else points
    if readable.size:
        wins = mean_of(np.nanmean(readable, axis=0), is_share=True)
        found |= {"win_rate": wins.value, "win_low": wins.low, "win_high": wins.high}
    return found


def spread_of_answers(answers: Sequence[Told]) -> dict[str, float]:
    """The standard deviation over seeds of the win rate; nothing for less than two rates."""
    known = [np.array(each.wins) for each in answers]
    rates = [float(np.nanmean(wins)) for wins in known if not np.isnan(wins).all()]
    return {"win_rate": stdev(rates)} if len(rates) > 1 else {}


def spread(scores: Sequence[PairScores]) -> dict[str, float]:
    """The standard deviation over seeds of what a method reached; nothing for one seed."""
    if len(scores) < 2:
        return {}
    found = {name: values.mean(axis=1).tolist() for name, values in columns(scores).items()}
    found["nll"] = [float(-one.chosen.sum() / one.chosen_tokens.sum()) for one in scores]
    return {name: stdev(values) for name, values in found.items()}


def verdicts(methods: Mapping[str, Sequence[PairScores]]) -> tuple[Verdict, ...]:
    """How every two methods stand to each other by accuracy, which no method's scale inflates."""
    right = {name: columns(scores)["accuracy"] for name, scores in methods.items()}
    return tuple(
        _verdict(one, other, right[one], right[other]) for one, other in combinations(right, 2)
    )


def _verdict(one: str, other: str, ours: Numbers, theirs: Numbers) -> Verdict:
    assert ours.shape[1] == theirs.shape[1], "methods are compared on the same pairs"
    difference = float(ours.mean() - theirs.mean())
    rng, pairs = np.random.default_rng(_SEED), ours.shape[1]
    drawn = np.empty(_DRAWS)
    for draw in range(_DRAWS):
        weights = np.bincount(rng.integers(pairs, size=pairs), minlength=pairs) / pairs
        values = [
            side[rng.integers(len(side), size=len(side))].mean(axis=0) @ weights
            for side in (ours, theirs)
        ]
        drawn[draw] = values[0] - values[1]
    low, high = map(float, np.percentile(drawn, _TAILS))
    if low == high:  # no pair differs, or all do: the rule of three
        low, high = max(-1.0, low - 3 / pairs), min(1.0, high + 3 / pairs)
    return Verdict(
        method=one, other=other, verdict=_word(low, high), difference=difference, low=low, high=high
    )


def _word(low: float, high: float) -> Word:
    if low > 0:
        return "better"
    return "worse" if high < 0 else "within noise"
