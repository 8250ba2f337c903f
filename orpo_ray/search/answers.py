"""What trials answer, in words: two of the same accuracy may differ in whether they still speak."""

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
    """A few held-out prompts with the greedy answers of the base and of each trial's adapter, by
    run name.

    Computed on the room of one worker, where the trials were. Raises StoppedError on request,
    ResourceError where no room becomes free in time, RunError where a model cannot be loaded or
    does not answer.
    """
    artifact = trials[0].storage.place_of(ground.artifact.path)
    room = {"num_cpus": ground.placement.cpus, "num_gpus": ground.placement.gpus}
    _wait(ray.remote(lambda: None).options(**room).remote(), console, ROOM_S)
    configs = [trial.config for trial in trials]
    answers: list[dict[str, str]] = _wait(
        ray.remote(_answer).options(**room).remote(artifact, configs), console
    )
    return answers


def _wait(pending: Any, console: Console, seconds: float = math.inf) -> Any:
    give_up = time.monotonic() + seconds
    while not ray.wait([pending], timeout=_POLL_S)[0]:
        if console.stop_requested():
            raise StoppedError(
                "stopped; all trials have ended, and the same command goes on from there"
            )
        if time.monotonic() > give_up:
            raise ResourceError(
                f"no room for one worker became free within {seconds:g} s; is the cluster busy?"
            )
        free_what_dead_controllers_hold()  # those of the trials that were given up last
    try:
        return ray.get(pending)
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        raise RunError(f"{type(cause).__name__}: {on_one_line(cause)}") from error


def _answer(place: str, trials: list[RunConfig]) -> list[dict[str, str]]:
    # Here, as the search itself loads no model.
    from orpo_ray.evaluation.evaluate import load_trained
    from orpo_ray.evaluation.generate import greedy_answers

    artifact = open_artifact(fetched_folder(place, MANIFEST))
    fetch_inputs(trials[0])
    tokenizer = load_tokenizer(trials[0].model, SILENT.announce)
    # From all over the held-out pairs: the sources stand one after the other.
    spread = [len(artifact.eval) * number // _PROMPTS for number in range(_PROMPTS)]
    prompts = [artifact.eval[index].prompt.tolist() for index in dict.fromkeys(spread)]

    def said(config: RunConfig, trained: str | None) -> list[str]:
        run = Run(config)
        run.refresh()
        stored = Decisions.from_json(run.facts()["decisions"])
        model = load_trained(config, replace(stored, strategy=Strategy.SINGLE), trained)
        answers = greedy_answers(model, tokenizer, prompts, _MAX_NEW_TOKENS)
        return [f"{answer.text} [cut]" if answer.is_cut else answer.text for answer in answers]

    by_run = {"base": said(trials[0], None)}
    by_run |= {config.name: said(config, Run(config).adapter) for config in trials}
    shown = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    return [
        {"prompt": prompt.strip(), **{run: answers[index] for run, answers in by_run.items()}}
        for index, prompt in enumerate(shown)
    ]
