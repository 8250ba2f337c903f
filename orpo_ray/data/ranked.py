"""Several answers with scores or ranks, and which of them are pairs."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, Literal

from orpo_ray.data.json_text import unpacked
from orpo_ray.data.messages import FIELDS, RowRefused, first_of
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

_OF_MESSAGES = frozenset({*FIELDS, "function_call"})

Scored = tuple[Any, float]
"""An answer and its score; a higher one is better."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Which of a row's scored answers are pairs: `data.pairs` and `data.min_margin`."""

    pairs: Literal["best-worst", "all", "adjacent"] = "best-worst"
    min_margin: float = 0.0


BEST_WORST = Ranking()


def scored_answers(row: Row, answers: str, scores: str) -> list[Scored] | None:
    """The answers that have a score, or None for a column of another kind.

    `scores` is the column of the scores, or that of the answers if they have their scores inside.
    A rank counts the other way: 1 is the best.
    """
    values = row[answers]
    if not isinstance(values, list) or not values:
        return None
    if answers == scores:
        if not all(isinstance(value, dict) for value in values):
            return None
        marks = [_mark_inside(value) for value in values]
        values = [_message(value) for value in values]
    else:
        marks = _marks(row[scores], scores, len(values))
        values = [unpacked(value, answers) for value in values]
    known = [
        (value, mark) for value, mark in zip(values, marks, strict=True) if not math.isnan(mark)
    ]
    if len(known) < 2:
        raise RowRefused("too-few-scores", f"{len(known)} of {len(values)} answers have a score")
    return known


def choose_pairs(answers: Sequence[Scored], ranking: Ranking) -> list[tuple[Any, Any]]:
    """Better and worse answers, the best ones first.

    `adjacent` takes neighbours in the order of the scores. Answers of one score are never a pair.
    """
    ordered = sorted(answers, key=lambda answer: -answer[1])
    candidates: Iterable[tuple[Scored, Scored]] = [(ordered[0], ordered[-1])]
    if ranking.pairs == "all":
        candidates = combinations(ordered, 2)
    if ranking.pairs == "adjacent":
        candidates = pairwise(ordered)
    found = [(one, other) for one, other in candidates if one[1] > other[1]]
    if not found:
        raise RowRefused("equal-scores", f"{len(answers)} answers")
    wide = [(one, other) for one, other in found if one[1] - other[1] >= ranking.min_margin]
    if not wide:
        raise RowRefused("small-margin")
    return [(one[0], other[0]) for one, other in wide]


def _message(answer: Row) -> Any:
    """An answer as a message if it has fields of one, else its text."""
    text = first_of(answer, _TEXTS)
    fields = {name: value for name, value in answer.items() if name in _OF_MESSAGES}
    return {**fields, "role": "assistant", "content": text} if fields else text


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
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return -number if is_rank else number
