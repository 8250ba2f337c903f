"""From verdicts to a win rate: pure counting and statistics.

A row is a win or a loss if the judge says so in both orders, as in MT-Bench (Zheng et al. 2023,
arXiv 2306.05685, section 3.4); otherwise it is a tie.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from orpo_ray.evaluation.judge.asking import TIE, UNREADABLE
from orpo_ray.runs.scores import Mean, interval_of

_POINTS = {"A": 1.0, TIE: 0.5, "B": 0.0}
_RIDGE = 0.01
"""It keeps the fit finite if the length alone decides every row, and is too small to be seen."""

Points = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Counts of rows. The ties include the disagreements."""

    wins: int
    losses: int
    ties: int
    disagreements: int
    unreadable: int
    points: Points
    """1, 0.5 or 0 for each row; NaN if it is unreadable."""


def tally(verdicts: Sequence[Sequence[str]]) -> Tally:
    """Count rows, each with its verdict in every order: "A", "B", "tie" or "unreadable"."""
    disagree = [len({*row}) > 1 and UNREADABLE not in row for row in verdicts]
    points = np.array([_points(row) for row in verdicts])
    return Tally(
        wins=int((points == 1).sum()),
        losses=int((points == 0).sum()),
        ties=int((points == 0.5).sum()),
        disagreements=sum(disagree),
        unreadable=int(np.isnan(points).sum()),
        points=points,
    )


def _points(verdicts: Sequence[str]) -> float:
    if UNREADABLE in verdicts:
        return float("nan")
    return _POINTS[verdicts[0]] if len({*verdicts}) == 1 else _POINTS[TIE]


def win_rate(points: Points) -> Mean:
    """The share of wins, ties as one half, with its 95 % interval over rows, [n]."""
    return interval_of(lambda weights: float(weights @ points / weights.sum()), len(points))


def length_controlled(points: Points, longer: Points) -> Mean:
    """The win rate that is left for answers of equal length, with its 95 % interval.

    `longer` [n] has by how many characters A's answer is the longer one. A logistic regression
    explains the points by a constant and tanh(longer / its standard deviation); the constant is the
    result. It is the model of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475) without the terms
    for the difficulty of each prompt, which need the answers of many models.
    """
    spread = longer.std()
    term = np.tanh(longer / spread) if spread > 0 else np.zeros(len(longer))
    columns = np.stack([np.ones(len(term)), term], axis=1)
    start = _fitted(points, columns, np.ones(len(term), dtype=np.int64), np.zeros(2))
    return interval_of(
        lambda weights: float(expit(_fitted(points, columns, weights, start)[0])), len(points)
    )


def _fitted(points: Points, columns: Points, weights: NDArray[np.int64], start: Points) -> Points:
    """The coefficients [k] of a logistic regression on columns [n, k]."""

    def loss(coefficients: Points) -> tuple[float, Points]:
        score = columns @ coefficients
        fit = weights @ (np.logaddexp(0, score) - points * score)
        slope = columns.T @ (weights * (expit(score) - points)) + _RIDGE * coefficients
        return float(fit + _RIDGE / 2 * coefficients @ coefficients), slope

    def curvature(coefficients: Points) -> Points:
        share = expit(columns @ coefficients)
        scaled = columns * (weights * share * (1 - share))[:, None]
        found: Points = scaled.T @ columns + _RIDGE * np.eye(len(coefficients))
        return found

    fitted: Any = minimize(loss, start, jac=True, hess=curvature, method="trust-exact")
    coefficients: Points = fitted.x
    return coefficients
