"""Means over held-out answers that are no pairs: some are labelled good, the others bad.

Their accuracy is the probability that a good answer is likelier, per token, than a bad one. It is
over all good and all bad answers, so it is the area under the ROC curve (Hanley & McNeil 1982).
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Weights = NDArray[np.int64]
_SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")


def share_of_better(good: Values, bad: Values, of_good: Weights, of_bad: Weights) -> float:
    """How probably a value drawn from `good` is larger than one drawn from `bad`; by weights.

    Equal values count as one half.
    """
    order = np.argsort(bad, kind="stable")
    below = np.concatenate([[0], np.cumsum(of_bad[order])])
    wins = sum(of_good @ below[np.searchsorted(bad[order], good, side)] for side in _SIDES) / 2
    return float(wins / (of_good.sum() * of_bad.sum()))


class SingleAnswers:
    """Good and bad answers, by their summed log-probs and their tokens."""

    def __init__(self, good: Values, good_tokens: Weights, bad: Values, bad_tokens: Weights):
        self._good, self._good_tokens = good, good_tokens
        self.good_means, self.bad_means = good / good_tokens, bad / bad_tokens

    def means(self, of_good: Weights | None = None, of_bad: Weights | None = None) -> Values:
        """Accuracy, margin, log-probs per token of both kinds, NLL per token of the good, [5].

        The weights say how often each answer counts. A mean of no answers is NaN.
        """
        of_good = np.ones(len(self._good), dtype=np.int64) if of_good is None else of_good
        of_bad = np.ones(len(self.bad_means), dtype=np.int64) if of_bad is None else of_bad
        good = bad = nll = accuracy = np.nan
        if len(self._good):
            good = float(of_good @ self.good_means / of_good.sum())
            nll = float(-(of_good @ self._good) / (of_good @ self._good_tokens))
        if len(self.bad_means):
            bad = float(of_bad @ self.bad_means / of_bad.sum())
        if len(self._good) and len(self.bad_means):
            accuracy = share_of_better(self.good_means, self.bad_means, of_good, of_bad)
        return np.array([accuracy, good - bad, good, bad, nll])

    def drawn(self, draws: int, seed: int) -> Iterator[Values]:
        """The means of each draw. Good answers are drawn apart from bad ones."""
        generator = np.random.default_rng(seed)
        for _ in range(draws):
            yield self.means(
                *(
                    np.bincount(generator.integers(count, size=count), minlength=count)
                    for count in (len(self._good), len(self.bad_means))
                )
            )
