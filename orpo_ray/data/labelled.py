"""Rows with one answer and a label, good or bad, as KTO trains on them (arXiv:2402.01306)."""

from typing import Any

from orpo_ray.data.messages import RowRefused
from orpo_ray.data.pairs import Row

ANSWERS = ("completion", "response", "output", "answer")
LABELS = ("label", "kto_tag", "thumbs_up", "thumbs", "feedback")
_GOOD = (
    "true",
    "1",
    "1.0",
    "good",
    "up",
    "thumbs_up",
    "like",
    "desirable",
    "yes",
    "positive",
    "chosen",
    "accepted",
    "correct",
    "👍",
)
_BAD = (
    *("false", "0", "0.0", "-1", "-1.0", "bad", "down", "thumbs_down", "dislike", "undesirable"),
    *("no", "negative", "rejected", "incorrect", "👎"),
)
SPEAKING = ("label", "kto_tag")
"""Columns that hold nothing but a label; the others may hold a text about the answer."""
_UP, DOWN = "thumbs_up", "thumbs_down"


def is_good(row: Row, column: str) -> bool | None:
    """Whether the label in a column calls the row's answer good; None if it is no label.

    Raises RowRefused for a value in a column of labels that is none, and for two labels that do not
    agree.
    """
    if column == _UP and row.get(DOWN) is not None:
        return _more_up(row[_UP], row[DOWN])
    found = says_good(row[column], column)
    for other in SPEAKING:
        value = row.get(other)
        if None not in (found, value) and says_good(value, other) != found:
            raise RowRefused("wrong-label", f"{column} {row[column]!r}, but {other} {value!r}")
    return found


def _more_up(up: Any, down: Any) -> bool:
    """Whether more thumbs are up than down; both may be counts, or yes and no."""
    ups, downs = _thumbs(up, _UP), _thumbs(down, DOWN)
    if ups == downs:
        raise RowRefused("wrong-label", f"{_UP} {up!r}, {DOWN} {down!r}")
    return ups > downs


def _thumbs(value: Any, column: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        if (found := says_good(value, column)) is None:
            raise RowRefused("wrong-label", f"{column} {value!r}") from None
        return float(found)


def says_good(label: Any, column: str) -> bool | None:
    """Whether a label calls its answer good; None if the column is not one of labels.

    Raises RowRefused for a value in a column of labels that is none.
    """
    word = str(label).strip().lower()
    if column == "feedback" and word.lstrip("-").replace(".", "").isdigit():
        return None  # maybe a scale of 1 to 5
    if word in _GOOD:
        return True
    if word in _BAD:
        return False
    if column in SPEAKING:
        raise RowRefused("wrong-label", f"{column} {label!r}")
    return None
