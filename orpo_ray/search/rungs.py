"""Which trials are given up: ASHA (arXiv:1810.05934), which never waits for other trials."""

from orpo_ray.runs.search import rungs

_ROUNDING = 1e-9


class Rungs:
    """The scores of all trials at each rung.

    The first rung is at the share `grace` of a run; each further one is at `eta` times the one
    before. The best 1/eta of all trials continue after the first rung. The best 1/eta**2 of all
    trials continue after the second.

    A trial is judged at every evaluation, not only at rungs. The first trial at a rung has no other
    to be compared with. So it continues, and may be given up later, when better ones have come. The
    best trial at a rung always continues to the next, so at least one trial finishes.
    """

    def __init__(self, grace: float, eta: int) -> None:
        self._eta = eta
        self._rungs = rungs(grace, eta)
        self._scores: list[dict[int, float]] = [{} for _ in self._rungs]

    def gives_up(self, trial: int, progress: float, score: float) -> bool:
        """Note a score (higher is better) at a share of the trial's run.

        Returns whether to end the trial.
        """
        passed = sum(progress > rung - _ROUNDING for rung in self._rungs)
        if not passed:
            return False
        for scores in self._scores[:passed]:
            scores.setdefault(trial, score)
        latest = self._scores[passed - 1]
        allowed: int = max(1, len(self._scores[0]) // self._eta**passed)
        return sum(other > latest[trial] for other in latest.values()) >= allowed
