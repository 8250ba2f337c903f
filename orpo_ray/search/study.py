"""What to try next and whom to give up: Optuna's samplers and ASHA's rungs, over trials that are on record.

The study lives in memory and is made anew from the record when a search goes on. What it says then is what it would
have said: each draw is seeded by the search's seed and the number of trials before it, and a trial's values at the
rungs are on record.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from orpo_ray.config import SearchConfig
from orpo_ray.config.space import Domain, Options
from orpo_ray.runs.search import Trial
from orpo_ray.search.rungs import Rungs
from orpo_ray.search.score import score
from orpo_ray.search.space import grid_points

_PROGRESS = 1000
"""Optuna counts progress in whole numbers: thousandths of a run."""
_AT_RANDOM = 10
"""Trials before TPE draws near what was good; of fewer it would make too much (Optuna's own number)."""

_ENDS = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}


class Study:
    """Draws values and judges evaluations; `trials` are those on record, `pairs` those that each is judged by."""

    def __init__(
        self, search: SearchConfig, domains: dict[str, Domain], seed: int, pairs: int, trials: Sequence[Trial]
    ) -> None:
        self._search = search
        self._domains = domains
        self._seed = seed
        self._pairs = pairs
        self._grid = grid_points(domains) if search.searcher == "grid" else []
        self._distributions = {name: _distribution(domain) for name, domain in domains.items()}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(direction="maximize", pruner=NopPruner())
        self._rungs = Rungs(search.grace, search.eta) if search.scheduler == "asha" else None
        self._open: dict[int, optuna.Trial] = {}
        for trial in trials:
            self._replay(trial)

    def draw(self, number: int) -> dict[str, Any]:
        """The values of the trial of that number, which is the next one."""
        if self._grid:
            return self._begin(number, self._grid[number])
        self._study.sampler = self._sampler(number)
        drawn = self._study.ask(self._distributions)
        values = {name: _decoded(domain, drawn.params[name]) for name, domain in self._domains.items()}
        # What counts is the settled value, which is all that the record knows.
        self._study.tell(drawn, state=TrialState.FAIL)
        return self._begin(number, values)

    def judge(self, trial: Trial) -> bool:
        """Whether to give the trial up after its latest evaluation. The end of a run is never given up."""
        progress = trial.last["step"] / trial.total_steps
        value = score(self._search.metric, trial.last, self._pairs)
        # TPE learns from trials that were given up by how far they came, and how well they did there.
        self._open[trial.number].report(value, int(_PROGRESS * progress))
        behind = self._rungs is not None and self._rungs.gives_up(trial.number, progress, value)
        return behind and progress < 1

    def end(self, trial: Trial) -> None:
        """Take in how a trial ended."""
        ended = self._open.pop(trial.number)
        value = score(self._search.metric, trial.last, self._pairs) if trial.state == "finished" else None
        self._study.tell(ended, value, _ENDS[trial.state])

    def _begin(self, number: int, values: dict[str, Any]) -> dict[str, Any]:
        encoded = {name: _encoded(domain, values[name]) for name, domain in self._domains.items()}
        self._study.enqueue_trial(encoded)
        self._open[number] = self._study.ask(self._distributions)
        return values

    def _replay(self, trial: Trial) -> None:
        self._begin(trial.number, trial.values)
        known = Trial(trial.number, trial.run, trial.values, total_steps=trial.total_steps)
        for evaluation in trial.evaluations:
            known.evaluations.append(evaluation)
            self.judge(known)
        if trial.state != "running":
            self.end(trial)

    def _sampler(self, number: int) -> BaseSampler:
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        if self._search.searcher == "random" or number < _AT_RANDOM:
            return RandomSampler(seed=seed)
        # The liar keeps trials that run at the same time apart.
        return TPESampler(seed=seed, n_startup_trials=1, constant_liar=True)


def _distribution(domain: Domain) -> BaseDistribution:
    if isinstance(domain, Options):
        return CategoricalDistribution(tuple(range(len(domain.values))))
    if domain.step is None or domain.log:  # Optuna has no steps on a logarithm: settled afterwards
        return FloatDistribution(domain.low, domain.high, log=domain.log)
    if all(isinstance(number, int) for number in (domain.low, domain.high, domain.step)):
        return IntDistribution(int(domain.low), int(domain.high), step=int(domain.step))
    return FloatDistribution(domain.low, domain.high, step=domain.step)


def _decoded(domain: Domain, drawn: Any) -> Any:
    return domain.values[drawn] if isinstance(domain, Options) else domain.settle(drawn)


def _encoded(domain: Domain, value: Any) -> Any:
    return domain.values.index(value) if isinstance(domain, Options) else value
