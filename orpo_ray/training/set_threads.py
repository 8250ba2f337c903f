"""Reads how many threads are set, and by whom. It loads no torch, so the planner reads it, too."""

import os

from orpo_ray.config import ScaleConfig

VARIABLE = "OMP_NUM_THREADS"
"""Whoever sets it decides: a user, or Ray for its workers."""


def set_threads() -> int | None:
    """The number of threads that the variable sets; None if it is not set, or sets none.

    Of a list, the first number counts. Torch, too, passes over 0, words and an empty variable.
    """
    first = os.environ.get(VARIABLE, "").split(",")[0].strip()
    number = int(first) if first.isdecimal() else 0
    return number or None


def threads_set_by(scale: ScaleConfig) -> int | None:
    """The number of threads that the environment sets, or else the config; None if it is open."""
    if (number := set_threads()) is not None:
        return number
    return None if scale.cpus_per_worker == "auto" else max(1, int(scale.cpus_per_worker))
