"""A search from its config to its outcome.

Finished trials on record are kept, unfinished ones are resumed, and the others are begun.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from orpo_ray.config import RunConfig, SearchConfig, dump, every_to_steps
from orpo_ray.config.search import ACCURACY
from orpo_ray.config.searched import settings_of, trial_count, with_values
from orpo_ray.distributed.preflight import cluster_nodes, runs_at_once
from orpo_ray.distributed.run import Ground, prepare_on
from orpo_ray.errors import ResourceError, RunError
from orpo_ray.objectives import build_objective
from orpo_ray.runs.console import Announce, Console, Hushed
from orpo_ray.runs.run import Run
from orpo_ray.runs.scores import are_few, too_few
from orpo_ray.runs.search import Found, Search, Start, Trial
from orpo_ray.runs.search_run import FOLDER, SearchRun
from orpo_ray.runs.summary import compared
from orpo_ray.search.answers import answer
from orpo_ray.search.course import Course, count_steps, take_up
from orpo_ray.search.outcome import (
    NLL,
    Compared,
    best_trial,
    pareto_front,
    reading,
    shown_values,
    trial_steps,
)
from orpo_ray.search.score import MARGIN
from orpo_ray.search.space import Space, probes, trial_config
from orpo_ray.search.study import Study
from orpo_ray.search.trial import TrialRoom
from orpo_ray.search.tuner import run_course
from orpo_ray.training.run_plan import steps_of_run

BEST_FILE = "best.yaml"


def run_search(run: SearchRun, space: Space, ground: Ground, console: Console) -> Search:
    """Run the trials that are left, then write what was found.

    Raises StoppedError on request. If no trial finished: ResourceError if all errors may be
    temporary, else RunError.
    """
    config, settings = run.config, settings_of(run.config)
    base = trial_config(config, space, {}, config.name)
    prepare_on(ground, Run(base), console)
    for variant in _reference_variants(config, space):
        variant.write_config()
        prepare_on(ground, variant, Hushed(console))
    _announce_late_evaluations(base, settings, ground, console.announce)
    search = _take_up(run, settings, len(ground.artifact.eval))
    if are_few(search.pairs):
        console.announce(too_few(search.pairs))
    study = Study(config, space.domains, search.pairs, search.trials)
    at_once = min(runs_at_once(ground.placement, cluster_nodes()), search.trial_count)
    console.announce(_plan(search, at_once, ground))
    course = Course(run, space, search, study, console)
    console.watch_search(search)
    try:
        if not course.is_over:
            pairs = run.storage.place_of(ground.artifact.path)
            console.announce("starting the trials: each loads the base before its first step")
            room = TrialRoom(pairs, ground.placement, ground.hardware, Path.cwd())
            run_course(run, course, room, at_once, console)
        count_steps(run, search)
        best = _best(search)
        search.outcome = _outcome(run, search, best, compare_with_given(run, search, best))
        answers = _answers(run, space, search, best, ground=ground, console=console)
        search.outcome = replace(search.outcome, answers=answers)
        search.status = "finished"
    finally:
        _end(search)
        run.keep(search)
    console.watch_search(search)
    return search


def _end(search: Search) -> None:
    """Mark a search that did not finish as stopped."""
    if search.status == "running":
        search.status = "stopped"


def _take_up(run: SearchRun, settings: SearchConfig, pairs: int) -> Search:
    """The search on record, or a new one, marked as running."""
    search = run.search() or Search(
        name=run.name, settings=dump(settings), trial_count=0, pairs=pairs
    )
    search.settings, search.trial_count, search.status = (
        dump(settings),
        trial_count(run.config),
        "running",
    )
    take_up(run, search)
    search.began = Start(time.time(), trial_steps(search.trials))
    run.keep(search)
    return search


def _announce_late_evaluations(
    base: RunConfig, settings: SearchConfig, ground: Ground, announce: Announce
) -> None:
    """Announce that ASHA cannot give any trial up, if that is so.

    It cannot if no evaluation lies between the grace and the end of a run.
    """
    steps = len(steps_of_run(base, len(ground.artifact.train)))
    every = every_to_steps(base.training.eval_every, steps)
    if settings.scheduler == "asha" and not any(
        step >= settings.grace * steps for step in range(every, steps, every)
    ):
        announce(
            "search.scheduler: asha cannot give any trial up, because none is evaluated between "
            f"search.grace ({settings.grace:g} of a run) and its end; lower training.eval_every"
        )


def _plan(search: Search, at_once: int, ground: Ground) -> str:
    """One line on what the search is about to do."""
    placement = ground.placement
    workers = f"{placement.workers} workers" if placement.workers > 1 else "one worker"
    each = f"{placement.cpus:g} CPU" + (f" and {placement.gpus:g} GPU" if placement.gpus else "")
    done = sum(trial.state != "running" for trial in search.trials)
    ended = f"; {done} have ended already" if done else ""
    trials = f"{search.trial_count} {'trials' if search.trial_count > 1 else 'trial'}"
    given = " (trial 0 is the given configuration)" if search.settings["try_given"] else ""
    return f"{trials}{given}, {at_once} at once; each takes {workers} with {each}{ended}"


def _reference_variants(config: RunConfig, space: Space) -> list[Run]:
    """One run for each cache of reference log-probs that the trials need."""
    found: dict[str, RunConfig] = {}
    for values in probes(config, space):
        run = trial_config(config, space, values, f"{config.name}/references")
        if build_objective(run.objective).needs_reference:
            found.setdefault(repr((run.model, *_start(run))), run)
    return [Run(variant) for variant in found.values()]


def _start(run: RunConfig) -> tuple[Any, ...]:
    """What the model that a run starts from depends on besides its base."""
    adapter = run.adapter
    if adapter.starts_elsewhere:
        return adapter, run.training.seed
    return adapter.kind, adapter.init_from


def _best(search: Search) -> Trial:
    """The best trial.

    If no trial finished: raises ResourceError if all errors may be temporary, else RunError.
    """
    best = best_trial(search)
    if best is not None:
        return best
    failed = [trial for trial in search.trials if trial.error]
    why = f"; trial {failed[0].number} failed: {failed[0].error}" if failed else ""
    message = f"none of {len(search.trials)} trials finished{why}"
    if failed and all(trial.may_pass for trial in failed):
        raise ResourceError(f"{message}; the same command tries them again")
    raise RunError(message)


def compare_with_given(run: SearchRun, search: Search, best: Trial) -> Compared | None:
    """The best trial compared with the given configuration, at the last step that both reached.

    Returns None if the given one was not tried, is the best, or has no evaluation.
    """
    given = search.trials[0]
    if not settings_of(run.config).try_given or given is best or not given.evaluations:
        return None
    step = int(min(given.last["step"], best.last["step"]))
    before, after = (run.trial_run(trial).scores(step) for trial in (given, best))
    found = compared(before, after)
    if not found:
        return None
    name = search.metric.removeprefix("eval/")
    if name not in found:
        name = "margin"
    elif name == "accuracy" and found[name].difference.value == 0:
        name = "margin"  # the margin decides between trials of the same accuracy
    return Compared(name, found[name], step)


def _outcome(run: SearchRun, search: Search, best: Trial, compared: Compared | None) -> Found:
    """What was found. The best trial's settings are written as a config."""
    run.path(BEST_FILE).write_text(_best_config(run.config, best), encoding="utf-8")
    run.store(BEST_FILE)
    return Found(
        best=best.number,
        values=best.values,
        metrics=best.last,
        adapter=run.trial_run(best).adapter,
        config=run.place_of(BEST_FILE),
        pareto=[_point(trial) for trial in pareto_front(search.trials)],
        answers=[],
        trial_steps=trial_steps(search.trials),
        reading=reading(search, compared),
    )


def _answers(
    run: SearchRun, space: Space, search: Search, best: Trial, ground: Ground, console: Console
) -> list[dict[str, str]]:
    """Answers of the best trial and of both ends of the Pareto front.

    If they cannot be generated, that is announced and the list is empty.
    """
    front = pareto_front(search.trials)
    ends = {trial.number: trial for trial in (front[0], best, front[-1])}
    trials = [
        Run(trial_config(run.config, space, trial.values, trial.run)) for trial in ends.values()
    ]
    console.announce("generating answers of the base and of the best trials")
    try:
        answers = answer(ground, trials, console)
    except (RunError, ResourceError) as error:
        console.announce(f"the answers of the best trials could not be generated: {error}")
        return []
    names = {trial.run: f"trial {number}" for number, trial in ends.items()}
    return [{names.get(key, key): text for key, text in sample.items()} for sample in answers]


def _best_config(config: RunConfig, best: Trial) -> str:
    """The whole run with the best trial's values, as YAML for `train`."""
    changed = with_values(config, best.values)
    tree = dump(changed) | {"name": f"{config.name.removesuffix(f'/{FOLDER}')}-best"}
    tree.pop("search", None)
    if not tree.get("stages"):
        tree.pop("stages", None)
    heading = f"# Trial {best.number} of search {config.name}: {shown_values(best.values)}\n"
    return heading + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _point(trial: Trial) -> dict[str, Any]:
    numbers = {name.removeprefix("eval/"): trial.last[name] for name in (ACCURACY, NLL, MARGIN)}
    return {"trial": trial.number, "values": trial.values, **numbers}
