"""What each held-out pair scored at an evaluation, as a run keeps it, and how sure its means are.

The intervals are percentile bootstraps over pairs (Efron & Tibshirani 1993, chapter 13): a model is
judged by these pairs, and other pairs of the same kind would have judged it a little differently.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from orpo_ray.errors import ConfigError

INTERVAL_METRICS = ("accuracy", "margin", "chosen_logp", "rejected_logp", "nll")
"""The means that have an interval: per pair, but for `nll`, which is per token of the chosen
answers.
"""

_DRAWS = 1000
_SEED = 20
_TAILS = (2.5, 97.5)
"""Percentiles: the interval holds 95 % of the draws."""


@dataclass(frozen=True)
class PairScores:
    """Summed log-probs of both answers and their token counts, each [n]."""

    chosen: NDArray[np.float64]
    rejected: NDArray[np.float64]
    chosen_tokens: NDArray[np.int64]
    rejected_tokens: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.chosen)


@dataclass(frozen=True)
class Change:
    """A mean before and after, and the interval of their difference on the same pairs."""

    before: float
    after: float
    low: float
    high: float

    @property
    def is_noise(self) -> bool:
        """Whether no difference is among what other pairs could have shown."""
        return self.low <= 0 <= self.high


def intervals(scores: PairScores) -> dict[str, tuple[float, float]]:
    """The 95 % interval of each of INTERVAL_METRICS."""
    columns = _columns(scores)
    drawn = np.stack([_means(columns, weights) for weights in _resamples(len(scores))])
    low, high = np.percentile(drawn, _TAILS, axis=0)
    return {
        name: (float(low[index]), float(high[index])) for index, name in enumerate(INTERVAL_METRICS)
    }


def changes(before: PairScores, after: PairScores) -> dict[str, Change]:
    """How each of INTERVAL_METRICS changed, pair by pair.

    Both score the same pairs in one order.
    """
    assert len(before) == len(after), "a change is between two evaluations of the same pairs"
    first, second = _columns(before), _columns(after)
    differences = np.stack(
        [_means(second, weights) - _means(first, weights) for weights in _resamples(len(before))]
    )
    low, high = np.percentile(differences, _TAILS, axis=0)
    once = np.ones(len(before), dtype=np.int64)
    was, now = _means(first, once), _means(second, once)
    return {
        name: Change(float(was[index]), float(now[index]), float(low[index]), float(high[index]))
        for index, name in enumerate(INTERVAL_METRICS)
    }


def smallest_visible(count: int) -> float:
    """The smallest change of accuracy that so many pairs can show, all of them turning the same
    way.

    By McNemar's exact test at 5 %: six pairs of one way and none of the other are the first that
    chance explains in fewer than one case of twenty (2 / 2^6).
    """
    return min(1.0, 6 / count)


def _columns(scores: PairScores) -> NDArray[np.float64]:
    """Per pair [n, 6]: INTERVAL_METRICS, of `nll` what is summed, and the tokens that it is divided
    by.
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
    """Write them in one step."""
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
