"""Which trials are given up: ASHA (arXiv:1810.05934), which never waits for other trials."""

from collections.abc import Callable
from operator import gt
from typing import Any

_ROUNDING = 1e-9


class Rungs:
    """The results of all trials at each rung. `beats` says which of two results is the better one.

    The first rung is at the share `grace` of a run; each further one is at `eta` times the one
    before. The best 1/eta of all trials continue after the first rung. The best 1/eta**2 of all
    trials continue after the second.

    A trial is judged at every evaluation, not only at rungs. The first trial at a rung has no other
    to be compared with. So it continues, and may be given up later, when better ones have come. The
    best trial at a rung always continues to the next, so at least one trial finishes.
    """

    def __init__(self, grace: float, eta: int, beats: Callable[[Any, Any], bool] = gt) -> None:
        self._eta = eta
        self._beats = beats
        self._rungs: list[float] = []
        while (rung := grace * eta ** len(self._rungs)) < 1 - _ROUNDING:
            self._rungs.append(rung)
        self._results: list[dict[int, Any]] = [{} for _ in self._rungs]

    def gives_up(self, trial: int, progress: float, result: Any) -> bool:
        """Note a result at a share of the trial's run.

        Returns whether to end the trial.
        """
        passed = sum(progress > rung - _ROUNDING for rung in self._rungs)
        if not passed:
            return False
        for results in self._results[:passed]:
            results.setdefault(trial, result)
        latest = self._results[passed - 1]
        allowed: int = max(1, len(self._results[0]) // self._eta**passed)
        return sum(self._beats(other, latest[trial]) for other in latest.values()) >= allowed
