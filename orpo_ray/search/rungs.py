"""Which trials are given up: ASHA (arXiv:1810.05934), which never waits for others to come to a rung."""

_ROUNDING = 1e-9


class Rungs:
    """Scores of all trials at each rung: `grace` of a run, `eta` times that, and so on to its end.

    A trial goes on while it is among the best 1/eta of those that have come to each of its rungs. It is asked at every
    evaluation, not at rungs alone: the first to come to a rung is let on with nobody to compare it with, and need not
    be trained to its end when better ones have come since.
    """

    def __init__(self, grace: float, eta: int) -> None:
        self._eta = eta
        self._scores: dict[float, dict[int, float]] = {}
        rung = grace
        while rung < 1 - _ROUNDING:
            self._scores[rung] = {}
            rung *= eta

    def gives_up(self, trial: int, progress: float, score: float) -> bool:
        """Take in an evaluation at that share of the trial's run, higher scores being better; whether to end it."""
        passed = [scores for rung, scores in self._scores.items() if progress > rung - _ROUNDING]
        for scores in passed:
            scores.setdefault(trial, score)
        return any(self._is_behind(trial, scores) for scores in passed)

    def _is_behind(self, trial: int, scores: dict[int, float]) -> bool:
        better = sum(other > scores[trial] for other in scores.values())
        return better >= max(1, len(scores) // self._eta)
