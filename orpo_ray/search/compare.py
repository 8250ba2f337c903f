"""A comparison from its config to its table: every method trains on the same pairs and budget.

Finished runs on record are kept, unfinished ones are resumed, and a method that fails is told with
its reason and does not end the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import mul
from pathlib import Path
from statistics import fmean
from typing import Any

from orpo_ray.config import RunConfig, dump, stage_configs
from orpo_ray.config.contenders import seeded, settings_of, with_steps
from orpo_ray.distributed.preflight import cluster_nodes, runs_at_once
from orpo_ray.distributed.run import Ground, prepare_on
from orpo_ray.errors import ConfigError, OrpoRayError, ResourceError, RunError
from orpo_ray.evaluation.judge.judging import Judge
from orpo_ray.report.words import counted
from orpo_ray.runs.comparison import Comparison, Entry, Standing
from orpo_ray.runs.comparison_run import ComparisonRun
from orpo_ray.runs.console import Console, Hushed
from orpo_ray.runs.results import TrainResult
from orpo_ray.runs.run import Run
from orpo_ray.runs.scores import PairScores, are_few, too_few
from orpo_ray.search.greedy import Told
from orpo_ray.search.judged import tell
from orpo_ray.search.reading import reading
from orpo_ray.search.standings import (
    figures,
    figures_of_answers,
    spread,
    spread_of_answers,
    verdicts,
)
from orpo_ray.search.tournament import Tournament, entries_of
from orpo_ray.search.trial import TrialRoom
from orpo_ray.search.tuner import run_course
from orpo_ray.training.equal_budget import Share, budget_of


@dataclass(frozen=True)
class Contender:
    """A method with the run that it makes of the config, and each seed's share of the budget."""

    method: str
    run: RunConfig
    shares: tuple[Share, ...]


def run_comparison(
    run: ComparisonRun,
    contenders: Sequence[Contender],
    failed: Mapping[str, OrpoRayError],
    ground: Ground,
    console: Console,
    *,
    judge: Judge | None = None,
) -> Comparison:
    """Train the runs that are left, then say what they reached.

    `failed` has the methods of which no run can begin, and why. Without a judge, words say whether
    an answer beats the base's. Raises StoppedError on request. If no run finished: ResourceError if
    all errors may be temporary, else RunError.
    """
    configs = {
        (each.method, seed): seeded(with_steps(each.run, list(share.steps)), seed)
        for each in contenders
        for seed, share in enumerate(each.shares)
    }
    comparison = _take_up(run, configs, ground, console)
    if are_few(comparison.pairs):
        console.announce(too_few(comparison.pairs))
    try:
        _train(run, comparison, configs, ground, console)
        done = _finished(comparison, configs)
        if not done:
            raise _nothing_finished(comparison.entries, failed)
        answers = tell(run, done, ground, console, judge)
        comparison = _conclude(comparison, contenders, done, answers, failed)
    finally:
        if comparison.status == "running":
            comparison = replace(comparison, status="stopped")
        run.keep(comparison)
    return comparison


def _take_up(
    run: ComparisonRun,
    configs: Mapping[tuple[str, int], RunConfig],
    ground: Ground,
    console: Console,
) -> Comparison:
    """The comparison on record, or a new one, marked as running."""
    known = run.comparison()
    names = {key: config.name for key, config in configs.items()}
    methods, seeds = (
        list(dict.fromkeys(method for method, _ in names)),
        settings_of(run.config).seeds,
    )
    entries = entries_of(known.entries if known else [], methods, seeds, names)
    for entry in entries:
        if entry.state == "finished" and not _is_there(Run(configs[entry.method, entry.seed])):
            console.announce(
                f"{entry.method}, seed {entry.seed}: its files are gone, so it is trained again"
            )
            entry.state = "running"
    comparison = replace(
        begun(run.config, ground), entries=entries, curve=known.curve if known else ()
    )
    run.keep(comparison)
    return comparison


def _is_there(run: Run) -> bool:
    run.refresh()
    return run.finished() is not None


def begun(config: RunConfig, ground: Ground) -> Comparison:
    """A comparison of which nothing is trained yet."""
    budget = budget_of(config, len(ground.artifact.train))
    return Comparison(
        name=config.name,
        settings=dump(settings_of(config)),
        budget={"unit": budget.unit, "amount": budget.amount},
        pairs=len(ground.artifact.eval),
        train_pairs=len(ground.artifact.train),
    )


def _train(
    run: ComparisonRun,
    comparison: Comparison,
    configs: Mapping[tuple[str, int], RunConfig],
    ground: Ground,
    console: Console,
) -> None:
    """Train every run that is left, as many at once as the cluster holds."""
    tournament = Tournament(
        run, comparison, {each.name: each for each in configs.values()}, console
    )
    if tournament.is_over:
        return
    for config in configs.values():
        first = next(iter(stage_configs(config)), config)
        if first.objective.needs_reference and not first.objective.only_in_trl:
            # Computed once, before runs that need the same log-probs begin together.
            reference = first.model_copy(update={"name": f"{run.name}/references"})
            Run(reference).write_config()
            prepare_on(ground, Run(reference), Hushed(console))
            break
    runs = len(comparison.entries)
    at_once = min(runs_at_once(ground.placement, cluster_nodes()), runs)
    console.announce(
        f"{counted(runs, 'run')}, {at_once} at once; each loads the base before its first step"
    )
    pairs = run.storage.place_of(ground.artifact.path)
    room = TrialRoom(pairs, ground.placement, ground.hardware, Path.cwd())
    run_course(run, tournament, room, at_once, console)


def _nothing_finished(
    entries: Sequence[Entry], failed: Mapping[str, OrpoRayError]
) -> RunError | ResourceError:
    reasons = [(each.method, each.error, each.may_pass) for each in entries if each.error]
    reasons += [
        (method, str(error), isinstance(error, ResourceError)) for method, error in failed.items()
    ]
    why = f"; {reasons[0][0]} failed: {reasons[0][1]}" if reasons else ""
    message = f"no run finished{why}"
    if reasons and all(may_pass for *_, may_pass in reasons):
        return ResourceError(f"{message}; the same command tries them again")
    return RunError(message)


def _finished(
    comparison: Comparison, configs: Mapping[tuple[str, int], RunConfig]
) -> dict[str, dict[int, Run]]:
    """The finished runs of each method that has one, by seed."""
    found: dict[str, dict[int, Run]] = {}
    for entry in comparison.entries:
        if entry.state == "finished":
            run = Run(configs[entry.method, entry.seed])
            found.setdefault(entry.method, {})[entry.seed] = run
    return found


def _conclude(
    comparison: Comparison,
    contenders: Sequence[Contender],
    done: Mapping[str, Mapping[int, Run]],
    answers: Mapping[str, Sequence[Told]],
    failed: Mapping[str, OrpoRayError],
) -> Comparison:
    """The finished comparison, with standings, verdicts and the words about them."""
    scores = {
        each.method: [_scores(run) for run in done[each.method].values()]
        for each in contenders
        if each.method in done
    }
    standings = [
        _standing(
            each,
            done[each.method],
            scores[each.method],
            answers.get(each.method, ()),
            in_seconds=comparison.budget["unit"] == "seconds",
        )
        if each.method in scores
        else Standing(method=each.method, state="failed")
        for each in contenders
    ]
    standings = [
        replace(each, error=_first_error(each.method, comparison.entries)) for each in standings
    ]
    standings += [
        Standing(method=method, state="failed", error=str(error))
        for method, error in failed.items()
    ]
    standings.sort(key=lambda each: -1.0 if each.accuracy is None else each.accuracy, reverse=True)
    comparison = replace(
        comparison, methods=tuple(standings), verdicts=verdicts(scores), status="finished"
    )
    return replace(comparison, reading=tuple(reading(comparison)))


def _last(run: Run) -> Run:
    """The run that made the result: the last stage, or the run itself."""
    stages = stage_configs(run.config)
    return Run(stages[-1], is_stage=True) if stages else run


def _result(run: Run) -> TrainResult:
    run.refresh()
    found = run.result()
    assert found is not None, "a finished run has a result"
    return found


def _scores(run: Run) -> PairScores:
    """The scores of the held-out pairs by the adapter that the run left."""
    last = _last(run)
    result = _result(last)
    step = result.steps if result.adapter_step is None else result.adapter_step
    found = last.scores(step)
    if found is None:
        raise ConfigError(
            f"{last.folder}: the scores of step {step} are missing; remove {run.folder}, and the "
            "same command trains it again"
        )
    return found


def _first_error(method: str, entries: Sequence[Entry]) -> str | None:
    return next((each.error for each in entries if each.method == method and each.error), None)


def _standing(
    contender: Contender,
    runs: Mapping[int, Run],
    scores: Sequence[PairScores],
    answers: Sequence[Told],
    *,
    in_seconds: bool,
) -> Standing:
    """What a method reached and took, over its finished runs, which are named by their seeds.

    `in_seconds`: the budget is in seconds, so what training used of it is what the clock showed.
    """
    results = [_result(each) for each in runs.values()]
    seconds = [each.seconds or 0.0 for each in results]
    shares = [contender.shares[seed] for seed in runs]
    devices = [len(each.workers) for each in results]
    speeds = [each.pairs_per_second for each in results if each.pairs_per_second]
    peaks = [each.peak_memory_bytes for each in results if each.peak_memory_bytes]
    befores = [_before(each).get("eval/chosen_logp") for each in results]
    known = [each for each in befores if each is not None]
    found: dict[str, Any] = figures(scores) | figures_of_answers(answers)
    return Standing(
        method=contender.method,
        state="finished",
        seeds=len(runs),
        **found,
        spread=spread(scores) | spread_of_answers(answers),
        chosen_before=fmean(known) if known else None,
        budget_used=fmean(_used(shares, seconds) if in_seconds else (each.used for each in shares)),
        seconds=fmean(seconds),
        pairs_per_second=fmean(speeds) if speeds else None,
        peak_memory_bytes=max(peaks, default=None),
        device_hours=fmean(map(mul, seconds, devices)) / 3600,
        runs=tuple(each.name for each in runs.values()),
    )


def _used(shares: Sequence[Share], seconds: Sequence[float]) -> list[float]:
    """What each run used of a budget in seconds: by the clock, but for its reference's part."""
    return [spent + share.reference for spent, share in zip(seconds, shares, strict=True)]


def _before(result: TrainResult) -> dict[str, float]:
    """The evaluation before the first step of the first stage."""
    return (result.stages[0] if result.stages else result).start
