"""Rows with one answer and a label, good or bad, as KTO trains on them (arXiv:2402.01306)."""

from typing import Any

from orpo_ray.data.messages import RowRefused

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
    "👍",
)
_BAD = (
    *("false", "0", "0.0", "-1", "-1.0", "bad", "down", "thumbs_down", "dislike", "undesirable"),
    *("no", "negative", "👎"),
)
_SPEAKING = ("label", "kto_tag")
"""Columns that hold nothing but a label; the others may hold a text about the answer."""


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
    if column in _SPEAKING:
        raise RowRefused("wrong-label", f"{column} {label!r}")
    return None
