"""What to try next and which trials to give up, by Optuna's sampler and ASHA's rungs.

The record of a search is its only memory. A draw follows from the trials on record, and is seeded
with the search's seed and the trial's number. So a resumed search draws what it would have drawn.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import torch
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import GPSampler
from optuna.trial import FrozenTrial, TrialState, create_trial
from torch.quasirandom import SobolEngine

from orpo_ray.config import RunConfig
from orpo_ray.config.searched import given_values, grid_points, settings_of
from orpo_ray.config.space import Domain, Options
from orpo_ray.runs.search import Trial
from orpo_ray.search.forecast import final_scores
from orpo_ray.search.rungs import Rungs
from orpo_ray.search.score import score

_ENDED = ("finished", "stopped")
_SPREAD = 4
"""Trials that end before the Gaussian process draws: fewer of them would mislead it."""
_NEAR = 0.01
"""Values nearer than this share of each range count as the same trial."""
_TRIES = 64
"""Spread points that are looked at for one that repeats no trial."""


class Study:
    """Draws values and judges evaluations.

    `trials` are those on record. `pairs` is the number of held-out pairs in an evaluation.
    """

    def __init__(
        self, config: RunConfig, domains: dict[str, Domain], pairs: int, trials: Sequence[Trial]
    ) -> None:
        self._search = settings_of(config)
        self._domains = domains
        self._distributions = {name: _distribution(domain) for name, domain in domains.items()}
        self._seed = config.training.seed
        self._pairs = pairs
        is_grid = self._search.searcher == "grid"
        self._grid = grid_points(config, domains) if is_grid else []
        self._given = given_values(config, domains) if self._search.try_given else None
        asha = self._search.scheduler == "asha"
        self._rungs = Rungs(self._search.grace, self._search.eta) if asha else None
        for trial in trials:
            for share, value in self._curve(trial):
                self._is_behind(trial, share, value)

    def draw(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """The values of the trial that follows `trials`, which are all of the search so far.

        Trial 0 has the given values, if the search tries them. The next draws are spread over the
        ranges, and so are all draws of `searcher: random`. Once enough trials have ended, a
        Gaussian process draws where a better trial is likely. If that would repeat a trial, a
        spread point is tried instead.
        """
        number = len(trials)
        if self._grid:
            begun = [trial.values for trial in trials]
            return next(point for point in self._grid if point not in begun)
        if number == 0 and self._given is not None:
            return self._given
        known = self._known(trials)
        ended = sum(trial.state is TrialState.COMPLETE for trial in known)
        if self._search.searcher == "gp" and ended >= _SPREAD:
            likely = self._likely_better(number, known)
            if not self._repeats(likely, trials):
                return likely
        drawn_before = number if self._given is None else number - 1
        return self._next_spread(drawn_before, trials)

    def _next_spread(self, number: int, trials: Sequence[Trial]) -> dict[str, Any]:
        """Spread point `number`, or the next that repeats no trial.

        The point itself if so many points bring no other: few values may all have been tried.
        """
        points = (spread_values(self._domains, self._seed, number + i) for i in range(_TRIES))
        first = next(points)
        if not self._repeats(first, trials):
            return first
        return next((point for point in points if not self._repeats(point, trials)), first)

    def _likely_better(self, number: int, known: Sequence[FrozenTrial]) -> dict[str, Any]:
        """Where the Gaussian process expects the greatest improvement, for trial `number`."""
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = GPSampler(seed=seed, n_startup_trials=1)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials(known)
        drawn = study.ask(self._distributions).params
        return {name: _decoded(domain, drawn[name]) for name, domain in self._domains.items()}

    def _known(self, trials: Sequence[Trial]) -> list[FrozenTrial]:
        """What the Gaussian process learns from.

        A trial that was given up counts with an estimate of its final score. A running trial has
        none, and keeps the next draw away. Given values outside of the ranges teach nothing.
        """
        ended = [trial for trial in trials if trial.state in _ENDED]
        running = [trial for trial in trials if trial.state == "running"]
        scores = final_scores([self._curve(trial) for trial in ended])
        worst = min((each for each in scores if math.isfinite(each)), default=0.0)
        return [
            *(
                self._frozen(trial, each if math.isfinite(each) else worst)
                for trial, each in zip(ended, scores, strict=True)
                if self._hold(trial.values)
            ),
            *(self._frozen(trial, None) for trial in running if self._hold(trial.values)),
        ]

    def _frozen(self, trial: Trial, value: float | None) -> FrozenTrial:
        return create_trial(
            params={
                name: _encoded(domain, trial.values[name]) for name, domain in self._domains.items()
            },
            distributions=self._distributions,
            value=value,
            state=TrialState.RUNNING if value is None else TrialState.COMPLETE,
        )

    def _hold(self, values: dict[str, Any]) -> bool:
        """Whether the ranges hold the values."""
        return all(_holds(domain, values[name]) for name, domain in self._domains.items())

    def _repeats(self, drawn: dict[str, Any], trials: Sequence[Trial]) -> bool:
        return any(self._is_near(drawn, trial.values) for trial in trials)

    def _is_near(self, drawn: dict[str, Any], tried: dict[str, Any]) -> bool:
        """Whether a trial with these values would repeat another."""
        return self._hold(tried) and all(
            _distance(domain, drawn[name], tried[name]) < _NEAR
            for name, domain in self._domains.items()
        )

    def judge(self, trial: Trial) -> bool:
        """Whether to give the trial up after its latest evaluation; never at the end of its run.

        The given configuration always runs to its end, so that no search ends with a worse one.
        """
        share, value = self._curve(trial)[-1]
        behind = self._is_behind(trial, share, value)
        is_given = trial.number == 0 and self._given is not None
        return behind and share < 1 and not is_given

    def _is_behind(self, trial: Trial, share: float, value: float) -> bool:
        """Note a score at the rungs. Returns whether they give the trial up."""
        return self._rungs is not None and self._rungs.gives_up(trial.number, share, value)

    def _curve(self, trial: Trial) -> list[tuple[float, float]]:
        """The trial's score at each share of its run."""
        return [
            (
                evaluation["step"] / trial.total_steps,
                score(self._search.metric, evaluation, self._pairs),
            )
            for evaluation in trial.evaluations
        ]


def spread_values(domains: dict[str, Domain], seed: int, number: int) -> dict[str, Any]:
    """Point `number` of a scrambled Sobol sequence, whose first few points are already spread."""
    engine = SobolEngine(len(domains), scramble=True, seed=seed)
    if number:
        engine.fast_forward(number)
    shares = engine.draw(1, dtype=torch.float64)[0].tolist()
    return {
        name: _at(domain, share)
        for (name, domain), share in zip(domains.items(), shares, strict=True)
    }


def _at(domain: Domain, share: float) -> Any:
    if isinstance(domain, Options):
        return domain.values[int(share * len(domain.values))]
    return domain.at(share)


def _holds(domain: Domain, value: Any) -> bool:
    """Whether a value is one that the range can draw: a given one may lie between two steps."""
    if isinstance(domain, Options):
        return value in domain.values
    return domain.holds(value) and domain.settle(value) == value


def _distribution(domain: Domain) -> BaseDistribution:
    if isinstance(domain, Options):
        return CategoricalDistribution(tuple(range(len(domain.values))))
    # Optuna has no steps on a log scale. `_decoded` rounds such values to their step.
    if domain.step is None or domain.log:
        return FloatDistribution(domain.low, domain.high, log=domain.log)
    last = domain.settle(domain.high)
    if all(isinstance(number, int) for number in (domain.low, domain.high, domain.step)):
        return IntDistribution(int(domain.low), int(last), step=int(domain.step))
    return FloatDistribution(domain.low, last, step=domain.step)


def _decoded(domain: Domain, drawn: Any) -> Any:
    return domain.values[drawn] if isinstance(domain, Options) else domain.settle(drawn)


def _encoded(domain: Domain, value: Any) -> Any:
    return domain.values.index(value) if isinstance(domain, Options) else value


def _distance(domain: Domain, one: Any, other: Any) -> float:
    """The distance of two values as a share of their range."""
    if isinstance(domain, Options):
        return float(one != other)
    return abs(domain.share(one) - domain.share(other))
