"""Answers of the best trials to a few prompts.

Trials of the same accuracy may differ in how well they still write, and only a reader sees that.
"""

from collections.abc import Sequence

from orpo_ray.config import RunConfig
from orpo_ray.data.store import MANIFEST, open_artifact
from orpo_ray.distributed.run import Ground
from orpo_ray.models.tokenizer import load_tokenizer
from orpo_ray.runs.console import SILENT, Console
from orpo_ray.runs.run import Run
from orpo_ray.search.said import said_by, spread
from orpo_ray.search.tasks import on_a_worker
from orpo_ray.storage import fetched_folder

_PROMPTS = 4
_MAX_NEW_TOKENS = 64


def answer(ground: Ground, trials: Sequence[Run], console: Console) -> list[dict[str, str]]:
    """The greedy answers of the base and of each trial's adapter to a few held-out prompts.

    A Ray task with the resources of one worker computes them. Each sample has the keys `prompt`,
    `base`, and the names of the runs. Raises StoppedError on request, ResourceError if no resources
    become free in time, and RunError if a model cannot be loaded or does not answer.
    """
    artifact = trials[0].storage.place_of(ground.artifact.path)
    configs = [trial.config for trial in trials]
    answers: list[dict[str, str]] = on_a_worker(ground, console, _answer, artifact, configs)
    return answers


def _answer(place: str, trials: list[RunConfig]) -> list[dict[str, str]]:
    artifact = open_artifact(fetched_folder(place, MANIFEST))
    numbers = spread(artifact.eval, _PROMPTS)

    def said(config: RunConfig, trained: str | None) -> list[str]:
        answers = said_by(config, trained, artifact.eval, numbers, _MAX_NEW_TOKENS)
        return [f"{answer.text} [cut]" if answer.is_cut else answer.text for answer in answers]

    by_run = {"base": said(trials[0], None)}
    by_run |= {config.name: said(config, Run(config).adapter) for config in trials}
    tokenizer = load_tokenizer(trials[0].model, SILENT.announce)
    prompts = [artifact.eval[number].prompt.tolist() for number in numbers]
    shown = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    return [
        {"prompt": prompt.strip(), **{run: answers[index] for run, answers in by_run.items()}}
        for index, prompt in enumerate(shown)
    ]
