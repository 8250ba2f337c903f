"""Compare methods on the same base, pairs and budget, as a Python function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from orpo_ray.api.judging import by_endpoint
from orpo_ray.api.training import train, tune
from orpo_ray.config import RunConfig, SearchConfig
from orpo_ray.config.contenders import (
    FOLDER,
    contender,
    pilot,
    seeded,
    settings_of,
    with_steps,
)
from orpo_ray.config.searched import with_values
from orpo_ray.errors import ConfigError, DataError, OrpoRayError, StoppedError
from orpo_ray.runs.comparison import Comparison, Point
from orpo_ray.runs.comparison_run import ComparisonRun, comparison_for
from orpo_ray.runs.console import Console, Hushed
from orpo_ray.runs.run import Run
from orpo_ray.runs.stop import StopSignal

if TYPE_CHECKING:
    from orpo_ray.config.compare import BudgetConfig
    from orpo_ray.data.store import Artifact
    from orpo_ray.distributed.run import Ground
    from orpo_ray.evaluation.judge.judging import Judge
    from orpo_ray.training.equal_budget import Share
    from orpo_ray.training.plan import Indices


def compare(
    config: RunConfig,
    console: Console = PRINTING,
    verbose: bool = False,
    curve: Sequence[int] = (),
) -> Comparison:
    """Train every method of `compare` with the same budget, and say which differences are real.

    Finished runs are kept, and an unfinished comparison goes on. A method that fails is told with
    its reason and does not end the others. With a `curve` of numbers of training pairs, methods are
    compared with so many pairs each time, with a budget in proportion. It is stopped as `train` is.
    """
    refuse_others(config, console)
    _refuse_points(curve)
    run = comparison_for(config)
    Run(config).check_writable()
    run.look(console)
    run.refuse_busy(ONLOOKER_S)
    refuse_missing_before_training(config)
    runs = {method: contender(config, method) for method in settings_of(config).methods}
    first = next(iter(runs.values()))
    placement = place_workers(first.scale, console, verbose, beside_others=True)
    check_cluster(Run(first), console)
    judge = _judge(config)
    from orpo_ray.data.subset import drawn, refuse_too_many

    artifact = prepare_training(Run(config), console)
    _refuse_unpaired(artifact)
    refuse_too_many(max(curve, default=0), artifact)
    for pairs in curve or [len(artifact.train)]:
        rows = drawn(artifact, pairs, config.training.seed)
        _refuse_budget(_with_pairs(config, pairs, artifact), artifact.train.lengths[rows])
    with run.at_work(console, ONLOOKER_S):
        wait_for_free_room(first.scale, placement, console)
        from orpo_ray.distributed.run import Ground

        ground = Ground(artifact, placement, hardware_of(first.scale, placement))
        if not curve:
            found = _tournament(config, ground, console, verbose, judge=judge)
        else:
            found = _curve(config, ground, curve, console, verbose, judge=judge)
        return _shown(run, found, console)


def _shown(run: ComparisonRun, found: Comparison, console: Console) -> Comparison:
    """The comparison with the place of its page, which is written."""
    from orpo_ray.report.write import try_to_report
    from orpo_ray.runs.shown import ComparisonFolder

    found = replace(found, report=try_to_report(ComparisonFolder(run.place), console.announce))
    run.keep(found)
    return found


def _judge(config: RunConfig) -> Judge | None:
    """The judge of answers that `compare.judge` names. Raises ConfigError if it is none."""
    settings = settings_of(config).judge
    if settings is None:
        return None
    try:
        return by_endpoint(settings.endpoint, settings.model, settings.key_file)
    except ConfigError as error:
        raise ConfigError(f"compare.judge.{error}") from error


def _tournament(
    config: RunConfig,
    ground: Ground,
    console: Console,
    verbose: bool,
    *,
    judge: Judge | None = None,
) -> Comparison:
    """Every method with every seed, on the pairs of `ground`."""
    from orpo_ray.search.compare import Contender, begun, run_comparison
    from orpo_ray.training.equal_budget import budget_of

    lengths = ground.artifact.train.lengths
    budget = budget_of(config, len(lengths))
    runs = {method: contender(config, method) for method in settings_of(config).methods}
    failed: dict[str, OrpoRayError] = {}
    speeds: dict[str, list[float]] = {}
    for method, run in runs.items():
        with _told(method, failed, console):
            speeds[method] = _speeds(run, console, verbose) if budget.unit == "seconds" else []
    shares = {
        method: _shares(config, method, budget, lengths, each) for method, each in speeds.items()
    }
    record = comparison_for(config)
    if record.comparison() is None:  # searches may take hours, and it can be shown meanwhile
        record.keep(begun(record.config, ground))
    ready = []
    for method, parts in shares.items():
        with _told(method, failed, console):
            run = with_steps(runs[method], list(parts[0].steps))
            ready.append(Contender(method, _searched(run, config, console, verbose), parts))
    with StopSignal(console, "stopping; the same command resumes the runs") as heard:
        return run_comparison(record, ready, failed, ground, heard, judge=judge)


@contextmanager
def _told(method: str, failed: dict[str, OrpoRayError], console: Console) -> Iterator[None]:
    """Keep the error of a method, which does not end the others."""
    try:
        yield
    except StoppedError:
        raise
    except OrpoRayError as error:
        console.announce(f"{method}: failed: {error}")
        failed[method] = error


def _point(
    config: RunConfig,
    ground: Ground,
    pairs: int,
    console: Console,
    verbose: bool,
    *,
    judge: Judge | None,
) -> Comparison:
    """The comparison with so many training pairs, in a folder of its own."""
    from orpo_ray.data.subset import subset

    run, artifact = Run(config), ground.artifact
    some = subset(artifact, pairs, config.training.seed, run.storage, console.announce)
    console.announce(f"comparing with {pairs:,} training pairs")
    name = f"{config.name}/{FOLDER}/pairs-{pairs}"
    own = _with_pairs(config, pairs, artifact).model_copy(update={"name": name})
    with comparison_for(own).at_work(console, ONLOOKER_S):
        return _tournament(own, replace(ground, artifact=some), console, verbose, judge=judge)


def _with_pairs(config: RunConfig, pairs: int, artifact: Artifact) -> RunConfig:
    """The config with its budget in proportion to some of the training pairs."""
    settings = settings_of(config)
    if settings.budget is not None:
        part = settings.budget.times(pairs / len(artifact.train))
        settings = settings.model_copy(update={"budget": part})
    return config.model_copy(update={"compare": settings})


def _refuse_budget(config: RunConfig, lengths: Indices) -> None:
    """Raise ConfigError for a budget that no whole number of steps of a method comes near."""
    from orpo_ray.training.equal_budget import budget_of

    budget = budget_of(config, len(lengths))
    if budget.unit != "seconds":
        for method in settings_of(config).methods:
            _shares(config, method, budget, lengths)


def _shares(
    config: RunConfig,
    method: str,
    budget: BudgetConfig,
    lengths: Indices,
    speeds: Sequence[float] = (),
) -> tuple[Share, ...]:
    """What a method does with the budget, by seed: another order of pairs has other tokens."""
    from orpo_ray.training.equal_budget import share

    run = contender(config, method)
    try:
        return tuple(
            share(seeded(run, seed), budget, lengths, speeds)
            for seed in range(settings_of(config).seeds)
        )
    except ConfigError as error:
        raise ConfigError(f"{error} (method {method})") from error


def _curve(
    config: RunConfig,
    ground: Ground,
    counts: Sequence[int],
    console: Console,
    verbose: bool,
    *,
    judge: Judge | None = None,
) -> Comparison:
    """The record of the whole comparison with a curve in it, which is kept after each point."""
    from orpo_ray.search.compare import begun
    from orpo_ray.search.reading import reading

    run = comparison_for(config)
    found, points = run.comparison() or begun(run.config, ground), list[Point]()
    try:
        for pairs in sorted(set(counts)):
            run.keep(replace(found, status="running"))
            point = _point(config, ground, pairs, console, verbose, judge=judge)
            points.append(Point(pairs=pairs, methods=point.methods, verdicts=point.verdicts))
            found = replace(found, curve=tuple(points))
            found = replace(found, reading=tuple(reading(found)))
    except BaseException:
        run.keep(replace(found, status="stopped"))
        raise
    is_half = found.entries and not found.methods  # of an earlier command without a curve
    return replace(found, status="stopped" if is_half else "finished")


def _speeds(run: RunConfig, console: Console, verbose: bool) -> list[float]:
    """The pairs a second of each stage of a method, by a short run."""
    console.announce(f"{run.name}: a short run tells its speed")
    result = train(pilot(run), Hushed(console), verbose)
    speeds = [each.pairs_per_second for each in result.stages or (result,)]
    assert all(speeds), "a run that has trained steps has a speed"
    return [speed for speed in speeds if speed]


def _refuse_points(curve: Sequence[int]) -> None:
    """Raise ConfigError for a curve that is no list of numbers of pairs."""
    if isinstance(curve, str) or not all(
        isinstance(pairs, int) and not isinstance(pairs, bool) and pairs > 0 for pairs in curve
    ):
        raise ConfigError(f"curve: must be numbers of pairs such as [250, 1000], not {curve!r}")


def _refuse_unpaired(artifact: Artifact) -> None:
    """Raise DataError if nothing is held out, or if answers stand alone."""
    if not len(artifact.eval):
        raise DataError("data.eval: methods are compared on held-out pairs, and there are none")
    if (artifact.eval.lengths[:, 1:] == 0).any():
        raise DataError(
            "data.eval: methods are compared on pairs, and some held-out answers stand alone"
        )


def _searched(run: RunConfig, config: RunConfig, console: Console, verbose: bool) -> RunConfig:
    """The run of a method with the settings that its own search finds, if it gets one."""
    trials = settings_of(config).search
    if not trials:
        return run
    console.announce(f"{run.name}: searching its settings with {trials} trials")
    searched = run.model_copy(update={"search": SearchConfig(trials=trials)})
    return with_values(run, tune(searched, console, verbose).values)
