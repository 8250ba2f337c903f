"""Reads how many threads the environment sets. It loads no torch, so the planner reads it, too."""

import os

VARIABLE = "OMP_NUM_THREADS"
"""Whoever sets it decides: a user, or Ray for its workers."""


def set_threads() -> int | None:
    """The number of threads that the variable sets; None if it is not set, or sets none.

    Of a list, the first number counts. Torch, too, passes over 0, words and an empty variable.
    """
    first = os.environ.get(VARIABLE, "").split(",")[0].strip()
    number = int(first) if first.isdecimal() else 0
    return number or None
