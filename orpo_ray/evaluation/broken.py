"""Which greedy answers are broken: they do not end, repeat themselves, or leave the pairs' words.

A model may prefer every chosen answer and write nothing that one can read. Accuracy does not see
that.
"""

import re
from collections.abc import Iterable, Set

_WORD = re.compile(r"\w+|[^\w\s]")
_RUN = 3
"""Words of a phrase whose repetition counts."""
_ENOUGH = 12
"""Answers of fewer words repeat nothing that one could call so."""
_DISTINCT = 0.5
"""An answer repeats itself if fewer of its phrases are distinct."""
_FOREIGN = 0.5
"""An answer leaves the words of the pairs if more of its words are in none of them."""


def words_of(text: str) -> list[str]:
    """The words and marks of a text, in lower case."""
    return _WORD.findall(text.lower())


def vocabulary(texts: Iterable[str]) -> set[str]:
    """All words of texts."""
    return {word for text in texts for word in words_of(text)}


def why_broken(text: str, known: Set[str], *, is_cut: bool) -> str | None:
    """Why an answer is broken, in a word; None if it is not. `known` are the words of the pairs."""
    words = words_of(text)
    if is_cut:
        return "endless"
    if not words:
        return "empty"
    phrases = [tuple(words[start : start + _RUN]) for start in range(len(words) - _RUN + 1)]
    if len(words) >= _ENOUGH and len(set(phrases)) < _DISTINCT * len(phrases):
        return "repeats"
    foreign = sum(word not in known for word in words)
    return "foreign" if foreign > _FOREIGN * len(words) else None


def nearness(answer: str, wanted: str, unwanted: str) -> float:
    """How much nearer an answer is to the chosen answer of its pair than to the rejected one.

    Near is the F1 of the words that both have, counted as often as they stand.
    """
    return _f1(answer, wanted) - _f1(answer, unwanted)


def _f1(one: str, other: str) -> float:
    left, right = words_of(one), words_of(other)
    rest = list(right)
    common = 0
    for word in left:
        if word in rest:
            rest.remove(word)
            common += 1
    return 2 * common / max(1, len(left) + len(right))
