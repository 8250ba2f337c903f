"""Lets the result of a run, or its base, answer held-out prompts; for tasks that load models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from orpo_ray.config import RunConfig, stage_configs
from orpo_ray.data.store import PairTable
from orpo_ray.models.tokenizer import load_tokenizer
from orpo_ray.runs.console import SILENT
from orpo_ray.runs.run import Run
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.setup import fetch_inputs
from orpo_ray.training.strategy import Strategy

if TYPE_CHECKING:
    from orpo_ray.training.generate import Answer


def spread(table: PairTable, count: int) -> tuple[int, ...]:
    """Numbers of pairs at equal distances. Pairs are ordered by source, so all have their share."""
    count = min(count, len(table))
    return tuple(dict.fromkeys(len(table) * place // count for place in range(count)))


def said_by(
    config: RunConfig,
    trained: str | None,
    table: PairTable,
    numbers: Sequence[int],
    max_new_tokens: int,
) -> list[Answer]:
    """The greedy answers of a run's base, or of what the run made and left at a place."""
    # Imported here, because only such a task loads models.
    from orpo_ray.evaluation.evaluate import load_trained
    from orpo_ray.training.generate import answers_of
    from orpo_ray.training.sampling import Sampling

    run = Run(config)
    run.refresh()
    last = stage_configs(config)[-1] if config.stages and trained is not None else config
    fetch_inputs(last)
    stored = Decisions.from_json(run.facts()["decisions"])
    model = load_trained(last, replace(stored, strategy=Strategy.SINGLE), trained)
    prompts = [table[number].prompt.tolist() for number in numbers]
    tokenizer = load_tokenizer(last.model, SILENT.announce)
    return answers_of(model, tokenizer, prompts, Sampling(max_new_tokens=max_new_tokens))
