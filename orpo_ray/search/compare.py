"""A comparison from its config to its table: every method trains on the same pairs and budget.

Finished runs on record are kept, unfinished ones are resumed, and a method that fails is told with
its reason and does not end the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from orpo_ray.config import RunConfig, dump, stage_configs
from orpo_ray.config.contenders import seeded, settings_of
from orpo_ray.distributed.preflight import cluster_nodes, runs_at_once
from orpo_ray.distributed.run import Ground, prepare_on
from orpo_ray.errors import ResourceError, RunError
from orpo_ray.evaluation.judge.judging import Judge
from orpo_ray.runs.comparison import Comparison, Entry, Standing
from orpo_ray.runs.comparison_run import ComparisonRun
from orpo_ray.runs.console import Console, Hushed
from orpo_ray.runs.results import TrainResult
from orpo_ray.runs.run import Run
from orpo_ray.runs.scores import PairScores, are_few, too_few
from orpo_ray.search.greedy import Told, answers_of_run, questions_of, told
from orpo_ray.search.judged import judged, sides_of
from orpo_ray.search.reading import reading
from orpo_ray.search.standings import figures, figures_of_answers, spread, verdicts
from orpo_ray.search.tournament import Tournament, entries_of
from orpo_ray.search.trial import TrialRoom
from orpo_ray.search.tuner import run_course
from orpo_ray.training.equal_budget import Share, budget_of


@dataclass(frozen=True)
class Contender:
    """A method with the run that it makes of the config, and its share of the budget."""

    method: str
    run: RunConfig
    share: Share


def run_comparison(
    run: ComparisonRun,
    contenders: Sequence[Contender],
    ground: Ground,
    console: Console,
    judge: Judge | None = None,
) -> Comparison:
    """Train the runs that are left, then say what they reached.

    Without a judge, words say whether an answer beats the base's. Raises StoppedError on request.
    If no run finished: ResourceError if all errors may be temporary, else RunError.
    """
    settings = settings_of(run.config)
    configs = {
        (each.method, seed): seeded(each.run, seed)
        for each in contenders
        for seed in range(settings.seeds)
    }
    comparison = _take_up(run, contenders, configs, ground)
    if are_few(comparison.pairs):
        console.announce(too_few(comparison.pairs))
    try:
        _train(run, comparison, configs, ground, console)
        done = _finished(comparison, configs)
        if not done:
            raise _nothing_finished(comparison.entries)
        answers = _tell(run, done, ground, console, judge)
        comparison = _conclude(comparison, contenders, done, answers, ground.placement.workers)
    finally:
        if comparison.status == "running":
            comparison = replace(comparison, status="stopped")
        run.keep(comparison)
    return comparison


def _take_up(
    run: ComparisonRun,
    contenders: Sequence[Contender],
    configs: Mapping[tuple[str, int], RunConfig],
    ground: Ground,
) -> Comparison:
    """The comparison on record, or a new one, marked as running."""
    known = run.comparison()
    names = {key: config.name for key, config in configs.items()}
    comparison = replace(
        begun(run.config, ground),
        entries=entries_of(
            known.entries if known else [],
            [each.method for each in contenders],
            settings_of(run.config).seeds,
            names,
        ),
        curve=known.curve if known else (),
    )
    run.keep(comparison)
    return comparison


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
    at_once = min(runs_at_once(ground.placement, cluster_nodes()), len(comparison.entries))
    console.announce(
        f"{len(comparison.entries)} runs, {at_once} at once; each loads the base before its first "
        "step"
    )
    pairs = run.storage.place_of(ground.artifact.path)
    room = TrialRoom(pairs, ground.placement, ground.hardware, Path.cwd())
    run_course(run, tournament, room, at_once, console)


def _nothing_finished(entries: Sequence[Entry]) -> RunError | ResourceError:
    failed = [entry for entry in entries if entry.error]
    why = f"; {failed[0].method} failed: {failed[0].error}" if failed else ""
    message = f"none of {len(entries)} runs finished{why}"
    if failed and all(entry.may_pass for entry in failed):
        return ResourceError(f"{message}; the same command tries them again")
    return RunError(message)


def _finished(
    comparison: Comparison, configs: Mapping[tuple[str, int], RunConfig]
) -> dict[str, list[Run]]:
    """The finished runs of each method that has one, by seed."""
    found: dict[str, list[Run]] = {}
    for entry in sorted(comparison.entries, key=lambda entry: entry.seed):
        if entry.state == "finished":
            found.setdefault(entry.method, []).append(Run(configs[entry.method, entry.seed]))
    return found


def _conclude(
    comparison: Comparison,
    contenders: Sequence[Contender],
    done: Mapping[str, Sequence[Run]],
    answers: Mapping[str, Sequence[Told]],
    workers: int,
) -> Comparison:
    """The finished comparison, with standings, verdicts and the words about them."""
    scores = {
        each.method: [_scores(run) for run in done[each.method]]
        for each in contenders
        if each.method in done
    }
    standings = [
        _standing(
            each, done[each.method], scores[each.method], answers.get(each.method, ()), workers
        )
        if each.method in scores
        else _failed(each.method, comparison.entries)
        for each in contenders
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
    assert found is not None, "the adapter's step was evaluated"
    return found


def _tell(
    run: ComparisonRun,
    done: Mapping[str, Sequence[Run]],
    ground: Ground,
    console: Console,
    judge: Judge | None,
) -> dict[str, list[Told]]:
    """What the greedy answers of each method tell, by seed; none if they cannot be generated."""
    count = settings_of(run.config).answers
    if not count:
        return {}
    some = next(each for runs in done.values() for each in runs)
    console.announce("generating greedy answers of the base and of every result")
    try:
        asked = questions_of(ground.artifact, run.config, count)
        base = answers_of_run(ground, asked, some, run, console, trained=False)
        ours = {
            each.name: answers_of_run(ground, asked, each, each, console)
            for runs in done.values()
            for each in runs
        }
    except (RunError, ResourceError) as error:
        console.announce(f"the answers could not be generated: {error}")
        return {}
    if judge is not None:
        console.announce(f"asking {judge.name} which answers are better than the base's")

    def told_by(each: Run) -> Told:
        found = told(asked, ours[each.name], base)
        if judge is None:
            return found
        return judged(
            found, sides_of(asked, ours[each.name], base, each.name), judge, each, console
        )

    return {method: [told_by(each) for each in runs] for method, runs in done.items()}


def _failed(method: str, entries: Sequence[Entry]) -> Standing:
    """A method of which no run has finished, with its first error."""
    errors = [each.error for each in entries if each.method == method]
    return Standing(method=method, state="failed", error=next(filter(None, errors), None))


def _standing(
    contender: Contender,
    runs: Sequence[Run],
    scores: Sequence[PairScores],
    answers: Sequence[Told],
    workers: int,
) -> Standing:
    """What a method reached and took, over its finished runs."""
    results = [_result(each) for each in runs]
    seconds = fmean(each.seconds or 0.0 for each in results)
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
        spread=spread(scores),
        chosen_before=fmean(known) if known else None,
        budget_used=contender.share.used,
        seconds=seconds,
        pairs_per_second=fmean(speeds) if speeds else None,
        peak_memory_bytes=max(peaks, default=None),
        device_hours=seconds * workers / 3600,
        runs=tuple(each.name for each in runs),
    )


def _before(result: TrainResult) -> dict[str, float]:
    """The evaluation before the first step of the first stage."""
    return (result.stages[0] if result.stages else result).start
