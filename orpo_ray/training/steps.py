"""The planned steps as tensors: what one rank computes of each, and the counts of the whole step."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from orpo_ray.data.store import PairTable
from orpo_ray.objectives import Objective
from orpo_ray.training.layout import PairBatch, collate_padded
from orpo_ray.training.plan import Step


@dataclass(frozen=True)
class Work:
    """What is trained on: the steps of the whole run and the pairs they index."""

    steps: list[Step]
    train: PairTable
    evaluation: PairTable
    reference: np.ndarray | None
    """Summed reference log-probs [n, 2], chosen and rejected, where the objective needs them."""
    pad_id: int
    token_budget: int


@dataclass(frozen=True)
class PackInput:
    """One pack as tensors, with its weight and, if needed, its reference log-probs [n, 2]."""

    batch: PairBatch
    weight: float
    reference: Tensor | None


@dataclass(frozen=True)
class StepInput:
    """This rank's packs of one optimizer step, and the counts of the whole step over all ranks."""

    packs: list[PackInput]
    pair_indices: np.ndarray
    pair_count: int
    token_count: int


class StepDataset(Dataset[StepInput]):
    """Item i is one rank's share of step `first + i`."""

    def __init__(self, work: Work, objective: Objective, first: int, rank: int) -> None:
        self._work = work
        self._objective = objective
        self._first = first
        self._rank = rank
        self._lengths = work.train.lengths

    def __len__(self) -> int:
        return len(self._work.steps) - self._first

    def __getitem__(self, index: int) -> StepInput:
        step = self._work.steps[self._first + index]
        lengths = self._lengths[step.pairs]
        scored = lengths[:, 1]
        if self._objective.nll_on == "full":
            scored = scored + lengths[:, 0] - 1
        packs = [self._pack(pack.pairs, pack.weight) for pack in step.packs[self._rank]]
        return StepInput(packs, step.pairs, len(step.pairs), int(scored.sum()))

    def _pack(self, pairs: np.ndarray, weight: float) -> PackInput:
        reference = self._work.reference
        batch = collate_padded(
            [self._work.train[i] for i in pairs],
            self._work.pad_id,
            score_prompt=self._objective.nll_on == "full",
            with_rejected=self._objective.needs_rejected,
        )
        return PackInput(batch, weight, None if reference is None else torch.from_numpy(reference[pairs]).float())
