"""Answers of the best trials to a few prompts.

Trials of the same accuracy may differ in how well they still write, and only a reader sees that.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from orpo_ray.config import RunConfig
from orpo_ray.data.store import MANIFEST, open_artifact
from orpo_ray.distributed.launch import free_what_dead_controllers_hold
from orpo_ray.distributed.run import Ground
from orpo_ray.errors import ResourceError, RunError, StoppedError, on_one_line
from orpo_ray.models.tokenizer import load_tokenizer
from orpo_ray.ray_runtime import ROOM_S
from orpo_ray.runs.console import SILENT, Console
from orpo_ray.runs.run import Run
from orpo_ray.storage import fetched_folder
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.setup import fetch_inputs
from orpo_ray.training.strategy import Strategy

_PROMPTS = 4
_MAX_NEW_TOKENS = 64
_POLL_S = 1.0


def answer(ground: Ground, trials: Sequence[Run], console: Console) -> list[dict[str, str]]:
    """The greedy answers of the base and of each trial's adapter to a few held-out prompts.

    A Ray task with the resources of one worker computes them. Each sample has the keys `prompt`,
    `base`, and the names of the runs. Raises StoppedError on request, ResourceError if no resources
    become free in time, and RunError if a model cannot be loaded or does not answer.
    """
    artifact = trials[0].storage.place_of(ground.artifact.path)
    resources = {"num_cpus": ground.placement.cpus, "num_gpus": ground.placement.gpus}
    # An empty task first. It shows whether the resources become free in time.
    _wait(ray.remote(lambda: None).options(**resources).remote(), console, ROOM_S)
    configs = [trial.config for trial in trials]
    answers: list[dict[str, str]] = _wait(
        ray.remote(_answer).options(**resources).remote(artifact, configs), console
    )
    return answers


def _wait(pending: Any, console: Console, seconds: float = math.inf) -> Any:
    """The result of a Ray task, unless the user stops first or the time is up."""
    give_up = time.monotonic() + seconds
    while not ray.wait([pending], timeout=_POLL_S)[0]:
        if console.stop_requested():
            raise StoppedError(
                "stopped after all trials ended; the same command generates their answers"
            )
        if time.monotonic() > give_up:
            raise ResourceError(
                f"no resources for one worker became free within {seconds:g} s; is the cluster "
                "busy?"
            )
        # Trials that were given up last may still hold resources.
        free_what_dead_controllers_hold()
    try:
        return ray.get(pending)
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        raise RunError(f"{type(cause).__name__}: {on_one_line(cause)}") from error


def _answer(place: str, trials: list[RunConfig]) -> list[dict[str, str]]:
    # Imported here, because only this task loads models.
    from orpo_ray.evaluation.evaluate import load_trained
    from orpo_ray.training.generate import answers_of
    from orpo_ray.training.sampling import Sampling

    artifact = open_artifact(fetched_folder(place, MANIFEST))
    fetch_inputs(trials[0])
    tokenizer = load_tokenizer(trials[0].model, SILENT.announce)
    # Held-out pairs are ordered by source. Prompts at equal distances come from several sources.
    spread = [len(artifact.eval) * number // _PROMPTS for number in range(_PROMPTS)]
    prompts = [artifact.eval[index].prompt.tolist() for index in dict.fromkeys(spread)]

    def said_by(config: RunConfig, trained: str | None) -> list[str]:
        run = Run(config)
        run.refresh()
        stored = Decisions.from_json(run.facts()["decisions"])
        model = load_trained(config, replace(stored, strategy=Strategy.SINGLE), trained)
        sampling = Sampling(max_new_tokens=_MAX_NEW_TOKENS)
        answers = answers_of(model, tokenizer, prompts, sampling)
        return [f"{answer.text} [cut]" if answer.is_cut else answer.text for answer in answers]

    by_run = {"base": said_by(trials[0], None)}
    by_run |= {config.name: said_by(config, Run(config).adapter) for config in trials}
    shown = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    return [
        {"prompt": prompt.strip(), **{run: answers[index] for run, answers in by_run.items()}}
        for index, prompt in enumerate(shown)
    ]
