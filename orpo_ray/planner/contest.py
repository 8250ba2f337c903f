"""What `orpo-ray compare` takes on one kind of GPU: every method, with every seed."""

from dataclasses import dataclass, replace

import numpy as np

from orpo_ray.config import SearchConfig
from orpo_ray.config.compare import CompareConfig
from orpo_ray.config.contenders import contender, settings_of, with_steps
from orpo_ray.errors import ConfigError
from orpo_ray.planner.duration import search_share
from orpo_ray.planner.hardware import Gpu
from orpo_ray.planner.interval import Interval
from orpo_ray.planner.plan import Paper
from orpo_ray.training.equal_budget import budget_of, share


@dataclass(frozen=True)
class Contest:
    """A comparison on paper: its methods, its seeds, and the hours of all runs together."""

    gpu: str
    methods: tuple[str, ...]
    seeds: int
    hours: Interval


def find_contest(paper: Paper, gpu: Gpu) -> Contest | None:
    """The comparison that a config describes, or the usual one.

    None if a method does not fit, or if nobody knows how many pairs there are or how fast they are
    trained. Raises ConfigError for a comparison of the config's own that makes no runs.
    """
    try:
        hours = _hours(paper, gpu)
    except ConfigError:
        if paper.config.compare is not None:
            raise
        return None
    settings = settings_of(paper.config)
    if hours is None:
        return None
    return Contest(gpu.name, settings.methods, settings.seeds, hours)


def _hours(paper: Paper, gpu: Gpu) -> Interval | None:
    pairs, settings = paper.lengths.pairs, settings_of(paper.config)
    if pairs is None:
        return None
    budget = budget_of(paper.config, pairs)
    if budget.unit == "seconds":  # it is the answer, but for starts and evaluations
        return _whole_runs(settings).times(len(settings.methods) * budget.amount / 3600)
    lengths = np.resize(paper.lengths.lengths, (pairs, 3))
    total = Interval.sure(0.0)
    for method in settings.methods:
        run = contender(paper.config, method)
        run = with_steps(run, list(share(run, budget, lengths).steps))
        found = replace(paper, config=run, prices=None).on(gpu).hours
        if found is None:
            return None
        total += found.times(settings.seeds)
        if settings.search:
            searched = run.model_copy(update={"search": SearchConfig(trials=settings.search)})
            trials = replace(paper, config=searched, prices=None).on(gpu).search
            assert trials is not None, "what fits has hours, and so has its search"
            total += trials
    return total


def _whole_runs(settings: CompareConfig) -> Interval:
    """How many whole runs a method's seeds and trials are; a trial may be given up early."""
    runs, trials = Interval.sure(settings.seeds), settings.search
    if trials:
        runs += search_share(SearchConfig(trials=trials), trials).times(trials)
    return runs
