"""Finds the known name that a misspelt one was meant to be."""

import re
from collections.abc import Iterable

_FREE = 3
"""Words up to this length must be right: `min` is not a misspelt `max`."""


def near_name(written: str, known: Iterable[str]) -> str | None:
    """The known name that differs by a typing slip only, or None.

    A slip keeps the first letter of each word, and the number of words: `save_steps` is not
    `max_steps`. Only a missing or wrong separator may change that number.
    """
    slips = {name: _slips(written, name) for name in known}
    found = [(count, name) for name, count in slips.items() if count is not None]
    return min(found)[1] if found else None


def _slips(written: str, name: str) -> int | None:
    """The number of wrong letters; None for a name that means something else."""
    here, there = _words(written), _words(name)
    if "".join(here) == "".join(there):
        return 0
    if len(here) != len(there):
        return None
    total = 0
    for one, other in zip(here, there, strict=True):
        slips = _distance(one, other)
        if slips > _allowed(other) or (slips and one[:1] != other[:1]):
            return None
        total += slips
    return total if total <= 2 else None


def _words(name: str) -> list[str]:
    """The words of a name in any style: max_length, max-length, maxLength."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return [word for word in re.split(r"[_\-\s]+", spaced) if word]


def _allowed(word: str) -> int:
    if len(word) <= _FREE:
        return 0
    return 1 if len(word) < 6 else 2


def _distance(one: str, other: str) -> int:
    """Letters inserted, left out, replaced, or swapped with their neighbour."""
    rows = [list(range(len(other) + 1))]
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, wanted in enumerate(other, 1):
            best = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]
