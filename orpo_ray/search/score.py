"""The number that trials are ranked by.

Higher is better. Trials with different lambda or beta can be compared by it.
"""

import math
from collections.abc import Mapping
from typing import Any

from orpo_ray.config.search import ACCURACY, METRICS

MARGIN = "eval/margin"
Evaluation = Mapping[str, Any]
"""Numbers by metric; None for a number that is not finite."""


def score(metric: str, evaluation: Evaluation, pairs: int) -> float:
    """How good an evaluation over `pairs` pairs is; minus infinity if a number was not finite.

    Accuracy moves in steps of 1/pairs. The margin is squeezed into less than one such step. So it
    only decides between trials of the same accuracy.
    """
    value: float | None = evaluation[metric]
    margin: float | None = evaluation[MARGIN]
    if value is None or margin is None:
        return -math.inf
    if metric != ACCURACY:
        return value if METRICS[metric] == "max" else -value
    squeezed = 0.5 * (1 + margin / (1 + abs(margin)))
    return value + 0.99 * squeezed / pairs
