"""What to try next and which trials to give up, by Optuna's samplers and ASHA's rungs.

The study lives in memory only. When a search is resumed, a new study is built from the record. It
makes the same decisions as the old one, because the record has each trial's values and evaluations,
and each draw is seeded with the search's seed and the trial's number.
"""

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
from optuna.pruners import NopPruner
from optuna.samplers import TPESampler
from optuna.trial import TrialState
from torch.quasirandom import SobolEngine

from orpo_ray.config import RunConfig
from orpo_ray.config.searched import given_values, grid_points, settings_of
from orpo_ray.config.space import Domain, Options
from orpo_ray.runs.search import Trial
from orpo_ray.search.rungs import Rungs
from orpo_ray.search.score import score

_PROGRESS = 1000
"""Optuna counts progress in whole numbers: thousandths of a run."""
_SPREAD = 10
"""Draws before TPE takes over: too few of them would mislead it. 10 is Optuna's default."""

_ENDS = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}


class Study:
    """Draws values and judges evaluations.

    `trials` are those on record. `pairs` is the number of held-out pairs in an evaluation.
    """

    def __init__(
        self, config: RunConfig, domains: dict[str, Domain], pairs: int, trials: Sequence[Trial]
    ) -> None:
        self._search = settings_of(config)
        self._domains = domains
        self._seed = config.training.seed
        self._pairs = pairs
        is_grid = self._search.searcher == "grid"
        self._grid = grid_points(config, domains) if is_grid else []
        self._given = given_values(config, domains) if self._search.try_given else None
        self._distributions = {name: _distribution(domain) for name, domain in domains.items()}
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(direction="maximize", pruner=NopPruner())
        asha = self._search.scheduler == "asha"
        self._rungs = Rungs(self._search.grace, self._search.eta) if asha else None
        self._open: dict[int, optuna.Trial] = {}
        self._begun: list[dict[str, Any]] = []
        for trial in trials:
            self._replay(trial)

    def draw(self, number: int) -> dict[str, Any]:
        """The values of trial `number`. Trial 0 has the given values, if the search tries them."""
        if self._grid:
            values = next(point for point in self._grid if point not in self._begun)
        elif number == 0 and self._given is not None:
            values = self._given
        else:
            drawn_before = number if self._given is None else number - 1
            values = self._drawn(drawn_before)
        self._begin(number, values)
        return values

    def _drawn(self, number: int) -> dict[str, Any]:
        """The values of draw `number`.

        The first draws are spread over the ranges, and so are all draws of `searcher: random`. TPE
        chooses the others.
        """
        if self._search.searcher == "random" or number < _SPREAD:
            return spread_values(self._domains, self._seed, number)
        self._study.sampler = self._tpe(number)
        drawn = self._study.ask(self._distributions)
        # TPE must learn from rounded values, as the record has them, and `_begin` gives it those.
        # This draw is not rounded, so FAIL makes TPE ignore it.
        self._study.tell(drawn, state=TrialState.FAIL)
        return {
            name: _decoded(domain, drawn.params[name]) for name, domain in self._domains.items()
        }

    def judge(self, trial: Trial) -> bool:
        """Whether to give the trial up after its latest evaluation; never at the end of its run.

        The given configuration always runs to its end, so that no search ends with a worse one.
        """
        progress = trial.last["step"] / trial.total_steps
        value = score(self._search.metric, trial.last, self._pairs)
        # If the trial is given up, TPE learns its last score and how far the trial had come.
        known = self._open.get(trial.number)
        if known is not None:
            known.report(value, int(_PROGRESS * progress))
        behind = self._rungs is not None and self._rungs.gives_up(trial.number, progress, value)
        is_given = trial.number == 0 and self._given is not None
        return behind and progress < 1 and not is_given

    def end(self, trial: Trial) -> None:
        """Tell the sampler how a trial ended."""
        ended = self._open.pop(trial.number, None)
        if ended is None:
            return
        value = (
            score(self._search.metric, trial.last, self._pairs)
            if trial.state == "finished"
            else None
        )
        self._study.tell(ended, value, _ENDS[trial.state])

    def _begin(self, number: int, values: dict[str, Any]) -> None:
        self._begun.append(values)
        if not all(_holds(domain, values[name]) for name, domain in self._domains.items()):
            return  # TPE cannot learn from given values outside of the ranges
        encoded = {name: _encoded(domain, values[name]) for name, domain in self._domains.items()}
        self._study.enqueue_trial(encoded)
        self._open[number] = self._study.ask(self._distributions)

    def _replay(self, trial: Trial) -> None:
        """Tell the study about a trial on record, as if the trial ran again."""
        self._begin(trial.number, trial.values)
        known = Trial(
            number=trial.number, run=trial.run, values=trial.values, total_steps=trial.total_steps
        )
        for evaluation in trial.evaluations:
            known.evaluations.append(evaluation)
            self.judge(known)
        if trial.state != "running":
            self.end(trial)

    def _tpe(self, number: int) -> TPESampler:
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        # With constant_liar, trials that run at once get different values.
        return TPESampler(seed=seed, n_startup_trials=1, constant_liar=True)


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
    return value in domain.values if isinstance(domain, Options) else domain.holds(value)


def _distribution(domain: Domain) -> BaseDistribution:
    if isinstance(domain, Options):
        return CategoricalDistribution(tuple(range(len(domain.values))))
    # Optuna has no steps on a log scale. `_decoded` rounds such values to their step.
    if domain.step is None or domain.log:
        return FloatDistribution(domain.low, domain.high, log=domain.log)
    if all(isinstance(number, int) for number in (domain.low, domain.high, domain.step)):
        return IntDistribution(int(domain.low), int(domain.high), step=int(domain.step))
    return FloatDistribution(domain.low, domain.high, step=domain.step)


def _decoded(domain: Domain, drawn: Any) -> Any:
    return domain.values[drawn] if isinstance(domain, Options) else domain.settle(drawn)


def _encoded(domain: Domain, value: Any) -> Any:
    return domain.values.index(value) if isinstance(domain, Options) else value
