"""A base that gives numbers until it meets a certain token."""

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from support import BASE
from transformers import AutoModelForCausalLM

from orpo_ray.config import RunConfig
from orpo_ray.data.pairs import TokenPair
from orpo_ray.data.store import Artifact
from orpo_ray.training.run_plan import steps_of_run


@dataclass(frozen=True)
class Poison:
    """A token id that stands in one training pair alone, and the step that meets it first."""

    token: int
    pair: int
    step: int


def step_pairs(config: RunConfig, artifact: Artifact, step: int) -> list[int]:
    """Indices of the pairs of a step, counted from 1."""
    return steps_of_run(config, len(artifact.train))[step - 1].tolist()


def find_poison(config: RunConfig, artifact: Artifact) -> Poison:
    """A token that just one training pair and no evaluation pair holds, and not the first step."""
    everywhere = Counter(
        token for table in (artifact.train, artifact.eval) for p in table for token in tokens_of(p)
    )
    for step in (2, 3, 4, 5):
        for pair in step_pairs(config, artifact, step):
            for token in tokens_of(artifact.train[pair]):
                if everywhere[token] == 1:
                    return Poison(token, pair, step)
    raise AssertionError("no token is unique to a pair; take fewer or other pairs")


def tokens_of(pair: TokenPair) -> set[int]:
    """The token ids of a pair."""
    return set(np.concatenate([pair.prompt, pair.chosen, pair.rejected]).tolist())


def poisoned_base(folder: Path, token: int) -> Path:
    """The demo base with an infinite embedding for one token; its head is a copy of its own, and
    whole.
    """
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("inf")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BASE / name, folder)
    return folder
