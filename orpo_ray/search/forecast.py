"""What trials that were given up would have scored at the end of their runs.

A sampler that took their last scores would learn how long they were trained, not how good their
values are.
"""

import math
from collections.abc import Sequence

import numpy as np

Curve = Sequence[tuple[float, float]]
"""Shares of a trial's run (0 to 1), in order, with the score at each."""


def final_scores(curves: Sequence[Curve]) -> list[float]:
    """The score of each trial at the end of its run, estimated if the trial was given up.

    The trials that got further, and end with a finite score, show which final scores belong to the
    scores at the share where a trial was given up. Between two of them, the final score is
    interpolated. A better trial counts as the best of them. A worse one stays as far behind as it
    was.
    """
    finals: dict[int, float] = {}
    for number in sorted(range(len(curves)), key=lambda number: -curves[number][-1][0]):
        share, score = curves[number][-1]
        further = [
            other
            for other, final in finals.items()
            if curves[other][-1][0] > share and math.isfinite(final)
        ]
        if not further:
            finals[number] = score
            continue
        then = sorted(_score_at(curves[other], share) for other in further)
        end = sorted(finals[other] for other in further)
        behind = max(then[0] - score, 0.0)
        finals[number] = float(np.interp(score, then, end)) - behind
    return [finals[number] for number in range(len(curves))]


def _score_at(curve: Curve, share: float) -> float:
    """The first score at or after a share of the run."""
    return next(score for reached, score in curve if reached >= share)
