"""A search from its config to its outcome: what is on record is gone on with, the rest is tried."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from orpo_ray.config import RunConfig, SearchConfig, dump, every_to_steps
from orpo_ray.config.search import ACCURACY
from orpo_ray.distributed.preflight import cluster_nodes, runs_at_once
from orpo_ray.distributed.run import Ground, prepare_on
from orpo_ray.errors import RunError
from orpo_ray.search.answers import answer
from orpo_ray.search.course import Course, Watch, catch_up, count_steps
from orpo_ray.search.outcome import NLL, best_trial, pareto_front, reading, shown_values, trial_steps
from orpo_ray.search.record import FOLDER, Search, Trial, read_search
from orpo_ray.search.score import MARGIN
from orpo_ray.search.space import Space, settings_of, trial_config, with_values
from orpo_ray.search.study import Study
from orpo_ray.search.trial import TrialRoom
from orpo_ray.search.tuner import run_course
from orpo_ray.training.loop import plan_run

BEST_FILE = "best.yaml"


def run_search(
    config: RunConfig,
    space: Space,
    ground: Ground,
    announce: Callable[[str], None],
    watch: Watch,
    stop_requested: Callable[[], bool],
) -> Search:
    """Try what is left to try, then lay down what was found; `config` names the search's own folder.

    Raises StoppedError on request, RunError where no trial came to its end.
    """
    base, settings = trial_config(config, space, {}, config.name), settings_of(config)
    prepare_on(ground, base, announce, stop_requested)
    _announce_late_evaluations(base, settings, ground, announce)
    search = read_search(config.run_dir) or Search(config.name, dump(settings), 0, len(ground.artifact.eval))
    search.trial_count, search.status = settings.trial_count, "running"
    catch_up(search, config.storage_dir)
    study = Study(settings, space.domains, config.training.seed, search.pairs, search.trials)
    at_once = min(runs_at_once(ground.placement, cluster_nodes()), search.trial_count)
    announce(_plan(search, at_once, ground))
    course = Course(config, space, search, study, watch)
    watch(search)
    try:
        if not course.is_over:
            run_course(config, course, TrialRoom(ground, Path.cwd()), at_once, stop_requested)
        count_steps(search, config.storage_dir)
        _conclude(config, space, search, ground, stop_requested)
        search.status = "finished"
    finally:
        search.status = "stopped" if search.status == "running" else search.status
        search.write(config.run_dir)
    watch(search)
    return search


def _announce_late_evaluations(
    base: RunConfig, settings: SearchConfig, ground: Ground, announce: Callable[[str], None]
) -> None:
    """Say so where no evaluation lies between the grace and the end of a run: nobody could be given up."""
    steps = len(plan_run(base, ground.artifact.train, world_size=1, token_budget=1))
    every = every_to_steps(base.training.eval_every, steps)
    if settings.scheduler == "asha" and not any(step >= settings.grace * steps for step in range(every, steps, every)):
        announce(
            f"asha can give no trial up: none is evaluated between search.grace ({settings.grace:g} of a run) and its "
            f"end; lower training.eval_every"
        )


def _plan(search: Search, at_once: int, ground: Ground) -> str:
    """One line on what is going to happen."""
    placement = ground.placement
    workers = f"{placement.workers} workers" if placement.workers > 1 else "one worker"
    each = f"{placement.cpus:g} CPU" + (f" and {placement.gpus:g} GPU" if placement.gpus else "")
    done = sum(trial.state != "running" for trial in search.trials)
    going_on = f"; {done} are done" if done else ""
    return f"{search.trial_count} trials, {at_once} at once: each takes {workers} of {each}{going_on}"


def _conclude(
    config: RunConfig, space: Space, search: Search, ground: Ground, stop_requested: Callable[[], bool]
) -> None:
    """Lay down the best trial's settings, the Pareto front, answers of its ends, and how to read them."""
    best = best_trial(search)
    if best is None:
        first = next((trial for trial in search.trials if trial.error), None)
        why = f"; trial {first.number} said: {first.error}" if first else ""
        raise RunError(f"none of {len(search.trials)} trials came to its end{why}")
    front = pareto_front(search.trials)
    ends = {trial.number: trial for trial in (front[0], best, front[-1])}
    configs = [trial_config(config, space, trial.values, trial.run) for trial in ends.values()]
    best_yaml = config.run_dir / BEST_FILE
    best_yaml.write_text(_best_config(config, best), encoding="utf-8")
    search.outcome = {
        "best": best.number,
        "values": best.values,
        "metrics": best.last,
        "adapter": str(config.storage_dir / best.run / "adapter"),
        "config": str(best_yaml),
        "pareto": [_point(trial) for trial in front],
        "answers": _by_trial(answer(ground, configs, stop_requested), ends),
        "trial_steps": trial_steps(search.trials),
        "reading": reading(search),
    }


def _best_config(config: RunConfig, best: Trial) -> str:
    """The whole run with the best trial's values, as YAML that `train` takes."""
    changed = with_values(config, best.values)
    tree = dump(changed) | {"name": f"{config.name.removesuffix(f'/{FOLDER}')}-best"}
    tree = {key: value for key, value in tree.items() if key != "search" and (key != "stages" or value)}
    heading = f"# Trial {best.number} of search {config.name}: {shown_values(best.values)}\n"
    return heading + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _point(trial: Trial) -> dict[str, Any]:
    numbers = {name.removeprefix("eval/"): trial.last[name] for name in (ACCURACY, NLL, MARGIN)}
    return {"trial": trial.number, "values": trial.values, **numbers}


def _by_trial(answers: list[dict[str, Any]], ends: dict[int, Trial]) -> list[dict[str, Any]]:
    """Answers under the numbers of the trials, not under the names of their runs."""
    names = {trial.run: f"trial {number}" for number, trial in ends.items()}
    return [{names.get(key, key): text for key, text in sample.items()} for sample in answers]
