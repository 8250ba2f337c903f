"""Several answers with scores or ranks: the best and the worst of them are a pair."""

import math
from typing import Any

from orpo_ray.data.messages import RowRefused, first_of
from orpo_ray.data.pairs import Row

LISTS = ("completions", "answers", "responses", "generations")
SCORES = ("scores", "ratings", "rewards", "ranks")
COLUMNS = (
    *((answers, scores) for answers in LISTS for scores in SCORES),
    *((answers, answers) for answers in LISTS),
)
"""Answers with their scores in a list beside them, or inside each answer."""

_TEXTS = ("response", "answer", "completion", "text", "content", "value")
_INSIDE = ("overall_score", "fine-grained_score", "score", "rating", "reward", "rank")


def best_and_worst(row: Row, answers: str, scores: str) -> tuple[Any, Any] | None:
    """The answers with the highest and the lowest score, or None for a column of another kind.

    `scores` is the column of the scores, or that of the answers if they have their scores inside.
    A rank counts the other way: 1 is the best. Answers without a score are left out.
    """
    values = row[answers]
    if not isinstance(values, list) or not values:
        return None
    if answers == scores:
        if not all(isinstance(value, dict) for value in values):
            return None
        marks = [_mark_inside(value) for value in values]
        values = [first_of(value, _TEXTS) for value in values]
    else:
        marks = _marks(row[scores], scores, len(values))
    known = [index for index, mark in enumerate(marks) if not math.isnan(mark)]
    if len(known) < 2:
        raise RowRefused("too-few-scores", f"{len(known)} of {len(values)} answers have a score")
    best, worst = max(known, key=marks.__getitem__), min(known, key=marks.__getitem__)
    if marks[best] == marks[worst]:
        raise RowRefused("equal-scores", f"{len(known)} answers")
    return values[best], values[worst]


def _marks(found: Any, column: str, count: int) -> list[float]:
    if not isinstance(found, list) or len(found) != count:
        raise RowRefused("too-few-scores", f"{column} has no number for each of {count} answers")
    return [_number(value, is_rank=column == "ranks") for value in found]


def _mark_inside(answer: Row) -> float:
    name = next((name for name in _INSIDE if answer.get(name) is not None), None)
    return math.nan if name is None else _number(answer[name], is_rank=name == "rank")


def _number(value: Any, *, is_rank: bool) -> float:
    """The value as a number of which a higher one is better; NaN if it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return -number if is_rank else number
