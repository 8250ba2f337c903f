"""Prepare, train, tune and plan, as Python functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from typing import TYPE_CHECKING, Any

from orpo_ray.api.ground import (
    ONLOOKER_S,
    PRINTING,
    before_training,
    check_cluster,
    hardware_of,
    place_workers,
    prepare_run,
    prepare_training,
    refuse_missing_before_training,
    refuse_missing_inputs,
    refuse_others,
    wait_for_free_room,
)
from orpo_ray.config import RunConfig, stage_configs
from orpo_ray.config import load_config as config_from
from orpo_ray.config.searched import trial_count
from orpo_ray.errors import ConfigError, DataError, ResourceError, RunError, StoppedError
from orpo_ray.lean_imports import without_collections
from orpo_ray.runs.console import SILENT, Console
from orpo_ray.runs.files import ENDED_BY, RUN_FILE
from orpo_ray.runs.results import SearchPlan, TrainPlan, TrainResult
from orpo_ray.runs.run import Run
from orpo_ray.runs.search import SearchResult
from orpo_ray.runs.search_run import SearchRun, search_for
from orpo_ray.runs.stages import conclude_stages
from orpo_ray.runs.stop import StopSignal
from orpo_ray.storage import file_at

if TYPE_CHECKING:
    from orpo_ray.data.store import Artifact
    from orpo_ray.distributed.preflight import Placement
    from orpo_ray.models.hardware import Hardware
    from orpo_ray.search.space import Space


def load_config(
    source: str | PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = ()
) -> RunConfig:
    """A run's settings from its YAML file, or its URL, or from plain data of the same shape.

    `overrides` are texts such as `training.seed=7`. Raises ConfigError with one line on any
    mistake.
    """
    place = file_at(source) if isinstance(source, str) else source
    return config_from(place, overrides)


# --- prepare --------------------------------------------------------------------------------------


def prepare(config: RunConfig, console: Console = PRINTING) -> Artifact:
    """Check and tokenise a run's preference pairs.

    Pairs that its storage holds are used again, if nothing that shapes them changed. Returns the
    pairs as they will be trained and evaluated, with a summary. Raises DataError for
    pairs that cannot be trained on.
    """
    refuse_others(config, console)
    refuse_missing_inputs(config)
    return prepare_run(Run(config), console)


# --- train ----------------------------------------------------------------------------------------


def train(
    config: RunConfig, console: Console = PRINTING, verbose: bool = False, extend: bool = False
) -> TrainResult:
    """Train a run to its end; an unfinished run of this name is resumed.

    A finished run is not trained again. With `extend` it continues with the further steps that its
    settings now ask for. The console gets what was decided, and the numbers of each step. If it
    asks to stop, or SIGINT or SIGTERM comes, the run ends with a checkpoint and StoppedError.
    `verbose` shows what Ray's processes log. The stages of a run are trained one after the other.
    Each is a run of its own in the folder of the whole.
    """
    refuse_others(config, console)
    run = Run(config)
    run.check_writable()
    if extend:
        _extend(run, console)
    if (finished := run.look(console)) is not None:
        return finished
    run.refuse_busy(ONLOOKER_S)
    refuse_missing_before_training(config)
    if config.stages:
        return _train_in_stages(run, console, verbose)
    placement = place_workers(config.scale, console, verbose)
    check_cluster(run, console)
    # This comes before the run has a folder, so that refused data leaves nothing behind.
    artifact = prepare_training(run, console)
    with _page_of_its_end(run, console), run.at_work(console, ONLOOKER_S) as finished:
        if finished is not None:
            return finished
        wait_for_free_room(config.scale, placement, console)
        hardware = hardware_of(config.scale, placement)
        _train(run, artifact, placement, hardware, console)
        result = run.result()
        assert result is not None, "a run that ends without an error has a result"
        return _shown(run, result, console)


def _shown(run: Run, result: TrainResult, console: Console) -> TrainResult:
    """Write the page of a finished run, and keep in its result where the page is."""
    from orpo_ray.report.write import try_to_report

    return run.keep_report(result, try_to_report(run, console.announce))


@contextmanager
def _page_of_its_end(run: Run, console: Console) -> Iterator[None]:
    """If a run that has begun fails or is stopped, keep why, and write its page all the same."""
    try:
        yield
    except (RunError, ResourceError, StoppedError) as error:
        run.refresh()
        if run.path(RUN_FILE).exists():
            from orpo_ray.report.write import try_to_report

            run.add_facts({ENDED_BY: str(error)})
            run.store(RUN_FILE)
            try_to_report(run, console.announce)
        raise


def _extend(run: Run, console: Console) -> None:
    """Reopen a finished run for more steps. `train` then resumes it."""
    from orpo_ray.runs.extend import described, extend, refuse_unfinished
    from orpo_ray.training.run_plan import steps_of_run

    config = run.config
    if config.stages:
        raise ConfigError(
            "--extend: a run in stages is not extended; start a new run of its last stage with "
            f"adapter.init_from={run.place}"
        )
    run.refresh()
    refuse_unfinished(run)
    artifact = prepare_run(run, SILENT)
    with run.lock(ONLOOKER_S):
        run.refresh()
        extend(run, len(steps_of_run(config, len(artifact.train))))
    console.announce(described(run))


def _train(
    run: Run, artifact: Artifact, placement: Placement, hardware: Hardware, console: Console
) -> None:
    """Train in this process or in Ray's workers. Says the plan, and at the end how wrong it was."""
    from orpo_ray.planner.foretold import foretell, look_back, on_record

    foretold = foretell(run, artifact, placement, hardware, console)
    planned = on_record(foretold)
    if placement.uses_ray:
        with without_collections():
            from orpo_ray.distributed.run import Ground, train_on

        with StopSignal(console) as heard:
            train_on(Ground(artifact, placement, hardware), run, heard, planned=planned)
    else:
        _train_here(run, artifact, hardware, planned, console)
    look_back(run, foretold, console)


def _train_here(
    run: Run,
    artifact: Artifact,
    hardware: Hardware,
    planned: dict[str, Any] | None,
    console: Console,
) -> None:
    """Decide what the settings leave open, then train in this process."""
    with without_collections():
        from orpo_ray.training import loop
        from orpo_ray.training.reporter import LocalReporter
        from orpo_ray.training.setup import settle

    with StopSignal(console) as heard:
        setup = settle(
            run, artifact, console.announce, hardware, owns_machine=True, planned=planned
        )
        loop.train(run, artifact, setup, LocalReporter(run, heard), console.announce)


def _train_in_stages(run: Run, console: Console, verbose: bool) -> TrainResult:
    config, stages = run.config, stage_configs(run.config)
    place_workers(stages[0].scale, SILENT, verbose)
    check_cluster(run, console)
    _prepare_stages(config, stages, verbose)
    with run.at_work(console, ONLOOKER_S) as finished:
        if finished is not None:
            return finished
        results = _train_stages(config, stages, console, verbose)
        result = conclude_stages(run, [Run(stage) for stage in stages], results)
        return _shown(run, result, console)


def _prepare_stages(config: RunConfig, stages: Sequence[RunConfig], verbose: bool) -> None:
    """Check workers and pairs of every stage before the first one is trained."""
    for number, stage in enumerate(stages):
        place_workers(stage.scale, SILENT, verbose)  # each stage tells its workers when it begins
        try:
            prepare_training(Run(before_training(config, stage)), SILENT)
        except DataError as error:
            raise DataError(f"stages.{number}: {error}") from error


def _train_stages(
    config: RunConfig, stages: Sequence[RunConfig], console: Console, verbose: bool
) -> list[TrainResult]:
    """Train the first stages of a run, or all of them, except those that are finished."""
    results = []
    for number, stage in enumerate(stages, start=1):
        run = Run(stage, is_stage=True)
        result = run.look(SILENT)
        done = ", finished already" if result else ""
        console.announce(
            f"stage {number} of {len(config.stages)}: {stage.objective.kind}, in {run.place}{done}"
        )
        results.append(result or train(stage, console, verbose))
    return results


# --- tune -----------------------------------------------------------------------------------------


def tune(config: RunConfig, console: Console = PRINTING, verbose: bool = False) -> SearchResult:
    """Search the settings that `search` names; an unfinished search is resumed.

    The search lies in the folder `search` of the run. A finished one is not run again. The console
    is shown the search after each change. Stages before the searched one are trained first, and
    shown as `train` shows them. It is stopped as `train` is.
    """
    refuse_others(config, console)
    Run(config).check_writable()
    run, space, searched = _read_search(config, console)
    if (search := run.look(console)) is not None:
        return search.result()
    run.refuse_busy(ONLOOKER_S)
    refuse_missing_before_training(config)
    placement = place_workers(searched.scale, console, verbose, beside_others=True)
    check_cluster(Run(searched), console)
    if space.stage:
        earlier = stage_configs(run.config)[: space.stage]
        _prepare_stages(run.config, [*earlier, searched], verbose)
        _train_stages(run.config, earlier, console, verbose)
    artifact = prepare_training(Run(searched), console)
    with run.at_work(console, ONLOOKER_S) as search:
        if search is not None:
            return search.result()
        wait_for_free_room(searched.scale, placement, console)
        return _search(run, space, artifact, placement, console)


def _read_search(config: RunConfig, console: Console) -> tuple[SearchRun, Space, RunConfig]:
    """The search, what it varies, and the config that all trials share."""
    from orpo_ray.search.space import resolve, trial_config, with_ranges

    run = search_for(with_ranges(config, console.announce))
    space = resolve(run.config)
    return run, space, trial_config(run.config, space, {}, run.name)


def _search(
    run: SearchRun, space: Space, artifact: Artifact, placement: Placement, console: Console
) -> SearchResult:
    from orpo_ray.distributed.run import Ground
    from orpo_ray.search.search import run_search

    ground = Ground(artifact, placement, hardware_of(run.config.scale, placement))
    with StopSignal(console, "stopping; the same command resumes the trials") as heard:
        search = run_search(run, space, ground, heard)
    from orpo_ray.report.write import try_to_report

    search.report = try_to_report(run, console.announce)
    run.keep(search)
    return search.result()


# --- plan -----------------------------------------------------------------------------------------


def plan(config: RunConfig, console: Console = PRINTING) -> TrainPlan:
    """What `train` would do.

    Workers are placed and pairs are prepared. No model is loaded, and no run begins.
    """
    refuse_others(config, console)
    _refuse_before_planning(config)
    if config.stages:
        return _plan_stages(config, console)
    run = Run(config)
    run.look(console)
    return _plan(run, place_workers(config.scale, console), console)


def plan_search(config: RunConfig, console: Console = PRINTING) -> SearchPlan:
    """What `tune` would do: how many trials, how long, how many at once, over which ranges."""
    refuse_others(config, console)
    _refuse_before_planning(config)
    run, space, searched = _read_search(config, console)
    run.look(console)
    placement = place_workers(searched.scale, console, beside_others=True)
    trial = _plan(Run(before_training(run.config, searched)), placement, console)
    from orpo_ray.distributed.preflight import cluster_nodes, runs_at_once

    trials = trial_count(run.config)
    return SearchPlan(
        name=run.name,
        trials=trials,
        at_once=min(runs_at_once(placement, cluster_nodes()), trials),
        trial=trial,
        space={name: asdict(domain) for name, domain in space.domains.items()},
    )


def _plan_stages(config: RunConfig, console: Console) -> TrainPlan:
    planned = []
    for number, stage in enumerate(stage_configs(config), start=1):
        console.announce(f"stage {number} of {len(config.stages)}: {stage.objective.kind}")
        Run(stage, is_stage=True).look(SILENT)
        planned.append(
            _plan(Run(before_training(config, stage)), place_workers(stage.scale, console), console)
        )
    return TrainPlan(
        name=config.name, steps=sum(plan.steps for plan in planned), stages=tuple(planned)
    )


def _plan(run: Run, placement: Placement, console: Console) -> TrainPlan:
    from orpo_ray.training.run_plan import steps_of_run
    from orpo_ray.training.setup import all_lengths, decide

    config = run.config
    artifact = prepare_training(run, console)
    decisions = decide(
        config,
        all_lengths(artifact),
        before=run.facts().get("decisions", {}),
        announce=console.announce,
        hardware=hardware_of(config.scale, placement),
        workers=placement.workers,
        nodes=placement.nodes,
    )
    return TrainPlan(
        name=run.name,
        steps=len(steps_of_run(config, len(artifact.train))),
        pairs=len(artifact.train),
        eval_pairs=len(artifact.eval),
        artifact=run.storage.place_of(artifact.path),
        workers=placement.workers,
        decisions=asdict(decisions),
    )


def _refuse_before_planning(config: RunConfig) -> None:
    """Refuse what a start on this machine would refuse, before Ray starts or pairs are read."""
    from orpo_ray.training.trackers import refuse_missing_trackers

    Run(config).check_writable()
    refuse_missing_before_training(config)
    for run in [config, *stage_configs(config)]:
        refuse_missing_trackers(run)
