"""Finds the largest micro-batch of a run by trying packs on the run's own device.

`budget` decides what to try and what to take; this module runs it.
"""

import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from orpo_ray.config.optimizers import OPTIMIZERS
from orpo_ray.config.training import TrainingConfig
from orpo_ray.data.store import PairTable
from orpo_ray.errors import ResourceError
from orpo_ray.objectives import Objective
from orpo_ray.runs.console import Announce
from orpo_ray.training.budget import (
    MOST_TOKENS,
    Budget,
    Memory,
    Sizes,
    find_budget,
    sample_pack,
    smaller,
    usable,
    with_set_tokens,
)
from orpo_ray.training.decisions import Decisions
from orpo_ray.training.memory import CpuMemory, GpuMemory, LimitedMemory, used_memory
from orpo_ray.training.optimizers import projected_layers, trained_embeddings
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.plan import Indices, Step, pack_costs
from orpo_ray.training.steps import pack_loss, step_of_one_pack
from orpo_ray.training.strategy import ModelSize, Strategy
from orpo_ray.training.world import World


class Probe:
    """Runs packs to measure the memory that they take.

    Weights, gradients and random states are the same afterwards.
    """

    def __init__(
        self, model: PairModel, objective: Objective, table: PairTable, pad_id: int, memory: Memory
    ) -> None:
        self._model, self._objective, self._table, self._pad_id = model, objective, table, pad_id
        self._memory = memory
        self.costs = pack_costs(table.lengths, model.layout, with_rejected=objective.needs_rejected)

    def room(self, workers: int, strategy: Strategy, training: TrainingConfig) -> int:
        """Bytes that packs may take if `workers` workers train with a strategy."""
        trained = sum(each.numel() for each in self._trained)
        size = ModelSize(0, trained, self._state_bytes(training) / trained)
        return usable(self._memory.free(), size, workers, strategy)

    @property
    def _trained(self) -> list[torch.nn.Parameter]:
        return [each for each in self._model.parameters() if each.requires_grad]

    def _state_bytes(self, training: TrainingConfig) -> float:
        """Bytes of the optimizer's state for everything that is trained."""
        kind = OPTIMIZERS[training.optimizer]
        projected = projected_layers(self._model.body) if kind.is_galore else []
        others = sum(each.numel() for each in self._trained)
        others -= sum(layer.weight.numel() for layer in projected)
        embeddings = sum(each.numel() for each in trained_embeddings(self._model))
        return kind.whole_bytes(others, embeddings) + sum(
            kind.projected_bytes(layer.in_features, layer.out_features, training.galore.rank)
            for layer in projected
        )

    def measure(self, tokens: int, checkpointing: bool) -> int | None:
        """Bytes that the worst pack of `tokens` tokens takes; None if memory runs out."""
        return self.measure_pack(sample_pack(self.costs, tokens), checkpointing)

    def measure_pack(self, pairs: Indices, checkpointing: bool) -> int | None:
        """Bytes that one pack takes, forward and backward; None if memory runs out.

        Gradients exist before it, as they do for all but the first pack of a step.
        """
        set_checkpointing(self._model, checkpointing)
        device = self._model.device
        devices = [device] if device.type == "cuda" else []
        peak = self._memory.peak_of(self._make_gradients)
        if peak is not None:
            with torch.random.fork_rng(devices=devices):
                peak = self._memory.peak_of(lambda: self._run(pairs))
        self._model.zero_grad(set_to_none=True)
        return peak

    def _make_gradients(self) -> None:
        for parameter in self._trained:
            parameter.grad = torch.zeros_like(parameter)

    def _run(self, pairs: Indices) -> None:
        model, objective = self._model, self._objective
        # Other packs of this size may have less in common, and must fit as well.
        step = step_of_one_pack(
            [self._table[i] for i in pairs],
            model.layout,
            self._pad_id,
            objective,
            joins_beginnings=False,
        )
        model.train()
        _, parts = pack_loss(model, objective, step.packs[0], step, model.device)
        parts.total.backward()


def set_checkpointing(model: PairModel, on: bool) -> None:
    """Have activations recomputed in the backward pass, or kept."""
    if on:
        model.causal_model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.causal_model.gradient_checkpointing_disable()


def settle_budget(
    probe: Probe,
    config: TrainingConfig,
    decisions: Decisions,
    plan: Callable[[int], list[Step]],
    largest_step: int,
    world: World,
    announce: Announce,
) -> Decisions:
    """Decide tokens and checkpointing if they are open, then try the plan's largest pack.

    All processes decide the same. `plan` gives the steps for a budget. `largest_step` is the number
    of tokens of the largest step. Raises ResourceError if the longest pair does not fit.
    """
    longest = int(probe.costs.tokens.max())
    budget = Budget(decisions.tokens_per_microbatch, decisions.gradient_checkpointing)
    may_shrink = decisions.find_budget and config.tokens_per_microbatch == "auto"
    if decisions.find_budget:
        most = max(longest, MOST_TOKENS if may_shrink else budget.tokens)
        sizes = Sizes(
            longest, probe.costs.of(sample_pack(probe.costs, 2 * longest)), largest_step, most
        )
        asked = None if config.gradient_checkpointing == "auto" else config.gradient_checkpointing
        room = probe.room(world.size, decisions.strategy, config)
        budgets = world.gather(find_budget(probe.measure, room, sizes, asked))
        found = _least(budgets, longest, config.memory_limit)
        if may_shrink:
            budget = found
        else:
            largest = max(longest, min(budget.tokens, largest_step))
            budget = Budget(budget.tokens, with_set_tokens(found, largest, asked))
    announce("trying the largest micro-batch")
    while True:
        packs = (pack.pairs for step in plan(budget.tokens) for rank in step.packs for pack in rank)
        worst = max(packs, key=probe.costs.of)
        if all(world.gather(probe.measure_pack(worst, budget.checkpointing) is not None)):
            break
        tokens = smaller(probe.costs.of(worst), longest) if may_shrink else None
        if tokens is None:
            raise _too_large(probe.costs.of(worst), config.memory_limit)
        budget = replace(budget, tokens=tokens)
    kept = "recomputed (gradient checkpointing)" if budget.checkpointing else "kept"
    if not budget.checkpointing and config.gradient_checkpointing == "auto":
        kept = "kept because there is room (training.memory_limit caps it)"
    announce(
        f"tokens per micro-batch {budget.tokens}, activations {kept}; the largest micro-batch, "
        f"{probe.costs.of(worst)} tokens, was tried; the longest training pair has {longest}"
    )
    return replace(
        decisions,
        tokens_per_microbatch=budget.tokens,
        gradient_checkpointing=budget.checkpointing,
        find_budget=False,
    )


def _least(budgets: list[Budget | None], longest: int, limit: float | None) -> Budget:
    """The budget for which every process has room."""
    found = [budget for budget in budgets if budget is not None]
    if len(found) < len(budgets):
        raise _too_large(longest, limit)
    return Budget(
        min(budget.tokens for budget in found), any(budget.checkpointing for budget in found)
    )


def _too_large(tokens: int, limit: float | None) -> ResourceError:
    room = "the memory that is free" if limit is None else f"training.memory_limit={limit:g}"
    return ResourceError(
        f"training.tokens_per_microbatch: a micro-batch of {tokens} tokens does not fit into "
        f"{room}; lower data.max_length or training.tokens_per_microbatch, or set "
        "training.gradient_checkpointing=true"
    )


def memory_of(device: str, world: World, limit: float | None = None) -> Memory:
    """The memory that this process may use, of which it takes up to `limit` GB."""
    here = socket.gethostname()
    whole = GpuMemory() if device == "cuda" else CpuMemory(world.gather(here).count(here))
    if limit is None:
        return whole
    return LimitedMemory(whole, int(limit * 1e9), partial(used_memory, device))
