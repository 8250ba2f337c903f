"""The scores of each held-out pair at an evaluation, and intervals of their means.

The intervals are percentile bootstraps over pairs (Efron & Tibshirani 1993, chapter 13). They show
how much the means would differ on other pairs of the same kind.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from orpo_ray.errors import ConfigError
from orpo_ray.runs.single_answers import SingleAnswers

INTERVAL_METRICS = ("accuracy", "margin", "chosen_logp", "rejected_logp", "nll")
"""The means that have an interval. They are over pairs; `nll` is over tokens of chosen answers."""

_DRAWS = 1000
_SEED = 20
_CHANCE = 0.05
"""A change that chance explains with this probability or more is noise."""
_FEW = 0.05
"""If held-out pairs cannot show an accuracy difference of this size, they are few."""
_TAILS = (2.5, 97.5)
"""Percentiles: the interval holds 95 % of the draws."""


@dataclass(frozen=True)
class PairScores:
    """Summed log-probs of both answers and their counts of trained tokens, each [n].

    An answer of no tokens is not there: its row has a single answer.
    """

    chosen: NDArray[np.float64]
    rejected: NDArray[np.float64]
    chosen_tokens: NDArray[np.int64]
    rejected_tokens: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.chosen)

    def rows(self, wanted: NDArray[Any]) -> "PairScores":
        """The rows with these numbers, or those that a mask has."""
        columns = {field.name: getattr(self, field.name)[wanted] for field in fields(self)}
        return PairScores(**columns)

    @property
    def comparable(self) -> "PairScores":
        """The pairs; the single answers if there is no pair."""
        is_pair = (self.chosen_tokens > 0) & (self.rejected_tokens > 0)
        return self.rows(is_pair) if is_pair.any() else self

    @property
    def comparisons(self) -> int:
        """How many comparisons there are that do not depend on each other, for a share of them.

        Of single answers, each of the rarer kind counts once.
        """
        good, bad = (
            int((tokens > 0).sum()) for tokens in (self.chosen_tokens, self.rejected_tokens)
        )
        return min(good, bad) or max(good, bad)

    @property
    def single_answers(self) -> SingleAnswers | None:
        """The rows as single answers, or None if there is a pair among them."""
        good, bad = self.chosen_tokens > 0, self.rejected_tokens > 0
        if (good & bad).any():
            return None
        return SingleAnswers(
            self.chosen[good],
            self.chosen_tokens[good],
            self.rejected[bad],
            self.rejected_tokens[bad],
        )


@dataclass(frozen=True)
class Mean:
    """A mean over held-out pairs with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Whether the interval holds zero."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Change:
    """A mean before and after, and their difference pair by pair."""

    before: Mean
    after: Mean
    difference: Mean
    chance: float | None = None
    """Of accuracy: how probable such a change is by chance (McNemar's exact test)."""

    @property
    def is_noise(self) -> bool:
        """Whether chance explains the change: the interval holds zero, or `chance` is too high."""
        return self.difference.holds_zero or (self.chance or 0.0) >= _CHANCE


def changes(before: PairScores, after: PairScores) -> dict[str, Change]:
    """How each of INTERVAL_METRICS changed. Both have the same pairs in the same order."""
    assert len(before) == len(after), "a change is between two evaluations of the same pairs"
    before, after = before.comparable, after.comparable
    was, drawn_before = _bootstrapped(before)
    now, drawn_after = _bootstrapped(after)
    parts = (
        _with_intervals(was, drawn_before),
        _with_intervals(now, drawn_after),
        _with_intervals(now - was, drawn_after - drawn_before),
    )
    found = {
        name: Change(before=one, after=other, difference=difference)
        for name, one, other, difference in zip(INTERVAL_METRICS, *parts, strict=True)
    }
    accuracy, count, chance = found["accuracy"], before.comparisons, None
    if before.single_answers is None:
        chance = _chance(_columns(before)[:, 0], _columns(after)[:, 0])
    found["accuracy"] = replace(
        accuracy,
        before=_never_certain(accuracy.before, count),
        after=_never_certain(accuracy.after, count),
        chance=chance,
        difference=_never_without_width(accuracy.difference, count),
    )
    return found


def intervals(scores: PairScores) -> dict[str, Mean]:
    """Each of INTERVAL_METRICS at one evaluation, with its interval."""
    scores = scores.comparable
    found = dict(zip(INTERVAL_METRICS, _with_intervals(*_bootstrapped(scores)), strict=True))
    return {**found, "accuracy": _never_certain(found["accuracy"], scores.comparisons)}


def mean_of(values: NDArray[np.float64], *, is_share: bool = False) -> Mean:
    """The mean of a number of each row with its interval; `is_share`: they are from 0 to 1."""
    drawn = np.array([[weights @ values / weights.sum()] for weights in _resamples(len(values))])
    (found,) = _with_intervals(np.array([values.mean()]), drawn)
    return _never_certain(found, len(values)) if is_share else found


def interval_of(statistic: Callable[[NDArray[np.int64]], float], count: int) -> Mean:
    """A share over `count` rows with its interval.

    `statistic` computes it from the number of times that each row counts.
    """
    drawn = np.array([[statistic(weights)] for weights in _resamples(count)])
    value = np.array([statistic(np.ones(count, dtype=np.int64))])
    (found,) = _with_intervals(value, drawn)
    return _never_certain(found, count)


def _bootstrapped(scores: PairScores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The means [metrics] over all pairs, and those of each draw [draws, metrics]."""
    if (single := scores.single_answers) is not None:
        return single.means(), np.stack(list(single.drawn(_DRAWS, _SEED)))
    columns, count = _columns(scores), len(scores)
    drawn = np.stack([_means(columns, weights) for weights in _resamples(count)])
    return _means(columns, np.ones(count, dtype=np.int64)), drawn


def _chance(before: NDArray[np.float64], after: NDArray[np.float64]) -> float:
    """The probability that chance alone gives a split as uneven as this one, or more uneven.

    A pair counts if the model is right on it before or after, but not both times. McNemar's exact
    test takes each such pair as a throw of a coin.
    """
    gained, lost = int((after > before).sum()), int((after < before).sum())
    turned = gained + lost
    tail = sum(math.comb(turned, k) for k in range(min(gained, lost) + 1))
    return min(1.0, float(2 * tail / 2**turned))


def _never_certain(share: Mean, count: int) -> Mean:
    """Widen the interval of a share of exactly 0 or 1. The bootstrap gives it no width.

    The rule of three: with n pairs of one kind, the other kind may still be 3 / n of all.
    """
    if share.value == 1:
        return replace(share, low=max(0.0, 1 - 3 / count))
    return replace(share, high=min(1.0, 3 / count)) if share.value == 0 else share


def _never_without_width(difference: Mean, count: int) -> Mean:
    """Widen an interval of no width by the rule of three.

    It has no width if no pair turned, or if all did.
    """
    value, room = difference.value, 3 / count
    if difference.low == difference.high:
        return replace(difference, low=max(-1.0, value - room), high=min(1.0, value + room))
    return difference


def _with_intervals(values: NDArray[np.float64], drawn: NDArray[np.float64]) -> list[Mean]:
    """Each value with the interval of its draws [draws, metrics]."""
    ends = np.percentile(drawn, _TAILS, axis=0)
    return [Mean(*map(float, found)) for found in zip(values, *ends, strict=True)]


def smallest_visible(count: int) -> float:
    """The smallest change of accuracy that this number of pairs can show.

    McNemar's exact test at 5 % decides: if six pairs change to one side and none to the other, the
    probability by chance is 2 / 2^6, which is below 5 %. With five pairs it is above.
    """
    return min(1.0, 6 / count)


def are_few(pairs: int) -> bool:
    """Whether there are too few held-out pairs to show differences of accuracy that matter."""
    return smallest_visible(pairs) > _FEW


def too_few(pairs: int) -> str:
    """The remark that the held-out pairs are too few to show small differences."""
    return (
        f"{pairs} held-out pairs show no difference of accuracy below "
        f"{smallest_visible(pairs):.3f}; raise data.eval_fraction, or name more pairs in data.eval."
    )


def _columns(scores: PairScores) -> NDArray[np.float64]:
    """Numbers of each pair [n, 6]: INTERVAL_METRICS, then the tokens of the chosen answer.

    The column of `nll` has the NLL summed over these tokens.
    """
    chosen = scores.chosen / scores.chosen_tokens
    rejected = scores.rejected / scores.rejected_tokens
    margin = chosen - rejected
    columns = (margin > 0, margin, chosen, rejected, -scores.chosen, scores.chosen_tokens)
    return np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)


def _means(columns: NDArray[np.float64], weights: NDArray[np.int64]) -> NDArray[np.float64]:
    sums = weights @ columns
    means: NDArray[np.float64] = np.append(sums[:4] / weights.sum(), sums[4] / sums[5])
    return means


def _resamples(count: int) -> Iterator[NDArray[np.int64]]:
    """How often each of `count` pairs is drawn, draw after draw; the same in every call."""
    generator = np.random.default_rng(_SEED)
    for _ in range(_DRAWS):
        yield np.bincount(generator.integers(count, size=count), minlength=count)


def scores_file(folder: Path, step: int) -> Path:
    """Where the scores of a step's evaluation are kept."""
    return folder / f"step-{step:08d}.safetensors"


def write_scores(path: Path, scores: PairScores) -> None:
    """Write scores so that a killed process leaves no half of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(
        {name: np.ascontiguousarray(column) for name, column in asdict(scores).items()}, temporary
    )
    temporary.replace(path)


def read_scores(path: Path) -> PairScores | None:
    """What `write_scores` wrote; None if there is none. Raises ConfigError for a damaged file."""
    if not path.exists():
        return None
    try:
        return PairScores(**load_file(path))
    except (OSError, SafetensorError, TypeError) as error:
        raise ConfigError(f"{path}: not as the run wrote it ({error}); remove the file") from error
