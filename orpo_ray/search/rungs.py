"""Which trials are given up: ASHA (arXiv:1810.05934), which never waits for others to come to a
rung.
"""

_ROUNDING = 1e-9


class Rungs:
    """Scores of all trials at each rung: `grace` of a run, `eta` times that, and so on to its end.

    One in eta of all trials that come to the first rung goes on from it, one in eta squared from
    the second: the best of those that came. A trial is asked at every evaluation, not at rungs
    alone: the first to come to a rung is let on with nobody to compare it with, and need not be
    trained to its end when better ones have come since. The best at a rung always goes on to the
    next, so some trial comes to its end.
    """

    def __init__(self, grace: float, eta: int) -> None:
        self._eta = eta
        self._rungs: list[float] = []
        while (rung := grace * eta ** len(self._rungs)) < 1 - _ROUNDING:
            self._rungs.append(rung)
        self._scores: list[dict[int, float]] = [{} for _ in self._rungs]

    def gives_up(self, trial: int, progress: float, score: float) -> bool:
        """Take in an evaluation at that share of the trial's run, higher scores being better;
        whether to end it.
        """
        passed = sum(progress > rung - _ROUNDING for rung in self._rungs)
        if not passed:
            return False
        for scores in self._scores[:passed]:
            scores.setdefault(trial, score)
        latest = self._scores[passed - 1]
        going_on: int = max(1, len(self._scores[0]) // self._eta**passed)
        return sum(other > latest[trial] for other in latest.values()) >= going_on
