"""Texts that only chat templates write: the marks of the known families, and how to find marks.

A mark that stands in a text of the data is read by the model like one that the template wrote, or
trains it to write another family's marks.
"""

import re
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple


class Family(NamedTuple):
    """The marks with which a family of models begins its turns, and the one that ends them."""

    starts: tuple[str, ...]
    end: str | None


FAMILIES = (
    Family(("<|im_start|>",), "<|im_end|>"),
    Family(("<|start_header_id|>", "<|end_header_id|>"), "<|eot_id|>"),
    Family(("<start_of_turn>",), "<end_of_turn>"),
    Family(("[INST]", "[/INST]"), None),
    Family(("<|user|>", "<|assistant|>"), "<|end|>"),
)
_ROLES = ("<|system|>",)
"""Phi-3 writes it for a system turn only."""
TURN_MARKS = (
    *(mark for family in FAMILIES for mark in (*family.starts, family.end) if mark),
    *_ROLES,
)
"""Marks of turns. They are refused in a text of any tokenizer."""

END_MARKS = (
    *(family.end for family in FAMILIES if family.end),
    *("<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "</s>", "<eos>"),
)
"""Marks that end an answer in some family. At the end of an answer they are read as its end."""

START_MARKS = ("<s>", "<|begin_of_text|>", "<bos>")
"""Marks that begin a text in some family."""


class Marks:
    """Finds the first of some marks in a text. Of marks that begin alike, the first named counts.

    Most texts do not even have the first letter of a mark, so that is looked for first. Then come
    the first three letters: a pattern is slow in a text of many brackets.
    """

    def __init__(self, marks: Iterable[str]) -> None:
        by_head: dict[str, list[str]] = {}
        for mark in dict.fromkeys(marks):
            by_head.setdefault(mark[:3], []).append(re.escape(mark[3:]))
        self._letters, self._heads = {head[0] for head in by_head}, tuple(by_head)
        some = [f"{re.escape(head)}(?:{'|'.join(rests)})" for head, rests in by_head.items()]
        self._pattern = re.compile("|".join(some) or "(?!)")

    def first_in(self, text: str) -> str | None:
        """The mark that comes first in a text, or None."""
        for letter in self._letters:
            if letter in text:
                break
        else:
            return None
        if not any(head in text for head in self._heads):
            return None
        found = self._pattern.search(text)
        return found and found.group()

    def split_by(self, sign: str, text: str) -> str:
        """A text with a sign after the first character of each mark, so that it has no mark.

        A mark of one character gives its place to the sign.
        """
        while (mark := self.first_in(text)) is not None:
            text = text.replace(mark, mark[0] + sign + mark[1:] if mark[1:] else sign)
        return text

    def first_of(self, value: Any) -> str | None:
        """The first mark in any text of a message or of what comes with it, however deep."""
        for text in texts_of(value):
            if mark := self.first_in(text):
                return mark
        return None


def texts_of(value: Any) -> list[str]:
    """Every text in a message or a list of them, however deep, with the names of its fields."""
    if isinstance(value, str):
        return [value]
    inside: Iterable[Any] = ()
    if isinstance(value, dict):
        inside = chain.from_iterable(value.items())
    elif isinstance(value, list | tuple):
        inside = value
    found: list[str] = []
    for each in inside:
        if isinstance(each, str):
            found.append(each)  # most values are texts
        else:
            found += texts_of(each)
    return found
