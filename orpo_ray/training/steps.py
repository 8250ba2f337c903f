"""The planned steps as tensors: what one rank computes, with the counts of the whole step."""

from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from orpo_ray.data.pairs import TokenPair
from orpo_ray.data.store import PairTable
from orpo_ray.objectives import LossParts, Objective, PairLogps, loss_parts
from orpo_ray.training.layout import PairBatch, collate
from orpo_ray.training.logprobs import pair_logps
from orpo_ray.training.plan import Layout, Step

Batch = TypeVar("Batch")
"""The tensors of a pack: a PairBatch, or what TRL collates."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The steps of the whole run, and the pairs that they index."""

    steps: list[Step]
    train: PairTable
    evaluation: PairTable
    reference: np.ndarray | None
    """Summed reference log-probs [n, 2], chosen and rejected, if the objective needs them."""
    pad_id: int
    layout: Layout
    token_budget: int
    schedule_from: int = 0
    """The step after which the learning rate's schedule begins."""


@dataclass(frozen=True)
class PackInput(Generic[Batch]):
    """One pack as tensors, with its weight and, if needed, its reference log-probs [n, 2]."""

    batch: Batch
    weight: float
    reference: Tensor | None


@dataclass(frozen=True)
class StepInput:
    """This rank's packs of one optimizer step, and the counts of the whole step over all ranks."""

    packs: list[PackInput[Any]]
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
        self._lengths, self._trained = work.train.lengths, work.train.trained

    def __len__(self) -> int:
        return len(self._work.steps) - self._first

    def __getitem__(self, index: int) -> StepInput:
        step = self._work.steps[self._first + index]
        packs = [self._pack(pack.pairs, pack.weight, step.pairs) for pack in step.packs[self._rank]]
        return StepInput(
            packs,
            step.pairs,
            len(step.pairs),
            scored_tokens(self._lengths[step.pairs], self._trained[step.pairs], self._objective),
        )

    def _pack(self, pairs: np.ndarray, weight: float, of_step: np.ndarray) -> PackInput[Any]:
        """One pack; `of_step` are the pairs of the whole step."""
        work = self._work
        batch = lay_out([work.train[i] for i in pairs], work.layout, work.pad_id, self._objective)
        reference = None
        if work.reference is not None:
            reference = torch.from_numpy(work.reference[pairs]).float()
        return PackInput(batch, weight, reference)


def scored_tokens(lengths: np.ndarray, trained: np.ndarray, objective: Objective) -> int:
    """The number of tokens that the NLL of a step is averaged over.

    `lengths` and `trained`: all and the trained tokens of (prompt, chosen, rejected) of the step's
    pairs, each [n, 3].
    """
    prompt = lengths[:, 0] - 1 if objective.nll_on == "full" else trained[:, 0]
    return int((prompt + trained[:, 1]).sum())


def lay_out(
    pairs: list[TokenPair],
    layout: Layout,
    pad_id: int,
    objective: Objective,
    *,
    joins_beginnings: bool = True,
) -> PairBatch:
    """The pairs as tensors, without the parts that the objective does not score."""
    return collate(
        pairs,
        layout,
        pad_id,
        score_prompt=objective.nll_on == "full",
        with_rejected=objective.needs_rejected,
        joins_beginnings=joins_beginnings,
    )


def step_of_one_pack(
    pairs: list[TokenPair],
    layout: Layout,
    pad_id: int,
    objective: Objective,
    reference: tuple[float, float] = (0.0, 0.0),
    *,
    joins_beginnings: bool = True,
) -> StepInput:
    """A step of one pack that belongs to no plan.

    If the objective needs reference log-probs, every pair gets those of `reference`.
    """
    lengths = np.array([[len(pair.prompt), len(pair.chosen), len(pair.rejected)] for pair in pairs])
    trained = np.array([pair.trained.counts for pair in pairs])
    references = torch.tensor([reference] * len(pairs)) if objective.needs_reference else None
    batch = lay_out(pairs, layout, pad_id, objective, joins_beginnings=joins_beginnings)
    pack = PackInput(batch, 1.0, references)
    tokens = scored_tokens(lengths, trained, objective)
    return StepInput([pack], np.arange(len(pairs)), len(pairs), tokens)


def pack_loss(
    model: nn.Module,
    objective: Objective,
    pack: PackInput[PairBatch],
    step: StepInput,
    device: torch.device,
) -> tuple[PairLogps, LossParts]:
    """Forward pass of one pack: the log-probs of its pairs, and its share of the step's loss.

    The share is not yet multiplied by the pack's weight.
    """
    batch = pack.batch.to(device)
    pairs = pair_logps(model(batch), batch)
    if pack.reference is not None:
        columns = pack.reference.to(device, non_blocking=True)
        pairs = replace(pairs, reference_chosen=columns[:, 0], reference_rejected=columns[:, 1])
    return pairs, loss_parts(objective, pairs, step.pair_count, step.token_count)
