"""Compare methods on the same base, pairs and budget, as a Python function."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orpo_ray.api.ground import (
    ONLOOKER_S,
    PRINTING,
    check_cluster,
    hardware_of,
    place_workers,
    prepare_training,
    refuse_missing_before_training,
    refuse_others,
    wait_for_free_room,
)
from orpo_ray.api.training import tune
from orpo_ray.config import RunConfig, SearchConfig
from orpo_ray.config.contenders import contender, settings_of, with_steps
from orpo_ray.config.searched import with_values
from orpo_ray.errors import DataError
from orpo_ray.runs.comparison import Comparison
from orpo_ray.runs.comparison_run import comparison_for
from orpo_ray.runs.console import Console
from orpo_ray.runs.run import Run
from orpo_ray.runs.stop import StopSignal

if TYPE_CHECKING:
    from orpo_ray.data.store import Artifact
    from orpo_ray.training.equal_budget import Share


def compare(config: RunConfig, console: Console = PRINTING, verbose: bool = False) -> Comparison:
    """Train every method of `compare` with the same budget, and say which differences are real.

    Finished runs are kept, and an unfinished comparison goes on. A method that fails is told with
    its reason and does not end the others. It is stopped as `train` is.
    """
    refuse_others(config, console)
    run = comparison_for(config)
    Run(config).check_writable()
    run.look(console)
    run.refuse_busy(ONLOOKER_S)
    refuse_missing_before_training(config)
    methods = settings_of(config).methods
    runs = {method: contender(config, method) for method in methods}
    first = runs[methods[0]]
    placement = place_workers(first.scale, console, verbose)
    check_cluster(Run(first), console)
    artifact = prepare_training(Run(config), console)
    _refuse_unpaired(artifact)
    shares = {method: _share(each, config, artifact) for method, each in runs.items()}
    runs = {method: with_steps(each, list(shares[method].steps)) for method, each in runs.items()}
    with run.at_work(console, ONLOOKER_S):
        wait_for_free_room(first.scale, placement, console)
        from orpo_ray.distributed.run import Ground
        from orpo_ray.search.compare import Contender, run_comparison

        found = [
            Contender(method, _searched(each, config, console, verbose), shares[method])
            for method, each in runs.items()
        ]
        ground = Ground(artifact, placement, hardware_of(first.scale, placement))
        with StopSignal(console, "stopping; the same command resumes the runs") as heard:
            return run_comparison(run, found, ground, heard)


def _refuse_unpaired(artifact: Artifact) -> None:
    """Raise DataError if nothing is held out, or if answers stand alone."""
    if not len(artifact.eval):
        raise DataError("data.eval: methods are compared on held-out pairs, and there are none")
    if (artifact.eval.lengths[:, 1:] == 0).any():
        raise DataError(
            "data.eval: methods are compared on pairs, and some held-out answers stand alone"
        )


def _share(run: RunConfig, config: RunConfig, artifact: Artifact) -> Share:
    from orpo_ray.training.equal_budget import budget_of, share

    return share(run, budget_of(config, len(artifact.train)), artifact.train.lengths)


def _searched(run: RunConfig, config: RunConfig, console: Console, verbose: bool) -> RunConfig:
    """The run of a method with the settings that its own search finds, if it gets one."""
    trials = settings_of(config).search
    if not trials:
        return run
    console.announce(f"{run.name}: searching its settings with {trials} trials")
    searched = run.model_copy(update={"search": SearchConfig(trials=trials)})
    return with_values(run, tune(searched, console, verbose).values)
