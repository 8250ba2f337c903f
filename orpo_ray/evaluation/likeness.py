"""How much one model behaves like another: log-probs of held-out pairs, and greedy answers."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from orpo_ray.data.store import PairTable
from orpo_ray.errors import RunError, on_one_line
from orpo_ray.models.hardware import DTYPES
from orpo_ray.models.placement import placement
from orpo_ray.runs.results import Likeness
from orpo_ray.runs.scores import PairScores
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.load import autocast_dtype
from orpo_ray.training.memory import is_out_of_memory
from orpo_ray.training.metrics import score_pairs, summarise
from orpo_ray.training.pair_model import PairModel

_OFFLOADED = ".offloaded"
"""Where transformers keeps weights that it cannot read from the files as they are."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What each model is asked: held-out pairs, and prompts that it answers greedily."""

    table: PairTable
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    decisions: Decisions
    padding_id: int


@dataclass(frozen=True)
class Sheet:
    """What a model said: the scores of all pairs, and the token ids of each answer."""

    scores: PairScores
    answers: tuple[tuple[int, ...], ...]


def ask(model: PairModel, questions: Questions, ends: Sequence[int] | None = None) -> Sheet:
    """The sheet of a model. Its answers end with `ends`, or as its generation_config says."""
    scores = score(model, questions)
    model.eval()
    return Sheet(
        scores, tuple(_answer(model, prompt, questions, ends) for prompt in questions.prompts)
    )


def score(model: PairModel, questions: Questions) -> PairScores:
    """The scores of all pairs."""
    budget = questions.decisions.tokens_per_microbatch
    return score_pairs(model, questions.table, questions.padding_id, budget)


def ask_folder(folder: Path, questions: Questions) -> Sheet:
    """The sheet of a folder, which is loaded as any program that uses transformers loads it."""
    with loaded_folder(folder, questions.decisions) as model:
        return ask(model, questions)


@contextmanager
def loaded_folder(folder: Path, decisions: Decisions) -> Iterator[PairModel]:
    """The model of a folder, loaded as any program that uses transformers loads it.

    What does not fit into memory stays on disk. Raises RunError for a folder that does not load.
    """
    dtype = DTYPES[decisions.dtype]
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            attn_implementation=decisions.attention,
            device_map=placement(folder, dtype, decisions.device),
            offload_folder=str(folder / _OFFLOADED),
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise RunError(f"{folder}: does not load again: {on_one_line(error)}") from error
    try:
        yield PairModel(model, autocast_dtype(decisions))
    finally:
        shutil.rmtree(folder / _OFFLOADED, ignore_errors=True)


def likeness(trained: Sheet, written: Sheet) -> Likeness:
    """How near the second is to the first. Both were asked the same."""
    same = [one == other for one, other in zip(trained.answers, written.answers, strict=True)]
    return Likeness(
        max_log_prob_difference=float(differences(trained.scores, written.scores).max()),
        accuracy=summarise(written.scores).get("accuracy"),
        greedy_agreement=sum(same) / len(same) if same else None,
    )


def differences(one: PairScores, other: PairScores) -> NDArray[np.float64]:
    """By how much two models' mean log-probs differ, for each answer that is there."""
    counts = np.concatenate([one.chosen_tokens, one.rejected_tokens])
    there = counts > 0
    sums = [np.concatenate([each.chosen, each.rejected])[there] for each in (one, other)]
    found: NDArray[np.float64] = np.abs(sums[0] - sums[1]) / counts[there]
    return found


@torch.no_grad()
def _answer(
    model: PairModel, prompt: Sequence[int], questions: Questions, ends: Sequence[int] | None
) -> tuple[int, ...]:
    """The greedy answer to one prompt, which is alone in its batch: padding would change sums."""
    ids = torch.as_tensor(prompt, device=model.device)[None]
    generate: Any = model.model.generate
    with torch.autocast(
        model.device.type, dtype=model.autocast, enabled=model.autocast is not None
    ):
        out = generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=questions.max_new_tokens,
            do_sample=False,
            **({} if ends is None else {"eos_token_id": list(ends)}),
            pad_token_id=questions.padding_id,
        )
    return tuple(out[0, ids.shape[1] :].tolist())
