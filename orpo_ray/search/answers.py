"""Answers of the best trials to a few prompts.

Trials of the same accuracy may differ in how well they still write, and only a reader sees that.
"""

from collections.abc import Sequence
from dataclasses import replace

from orpo_ray.config import RunConfig
from orpo_ray.data.store import MANIFEST, open_artifact
from orpo_ray.distributed.run import Ground
from orpo_ray.models.tokenizer import load_tokenizer
from orpo_ray.runs.console import SILENT, Console
from orpo_ray.runs.run import Run
from orpo_ray.search.tasks import on_a_worker
from orpo_ray.storage import fetched_folder
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.setup import fetch_inputs
from orpo_ray.training.strategy import Strategy

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
