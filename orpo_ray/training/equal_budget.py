"""How many steps of each stage a method may train, so that all methods use the same budget.

A pair that is trained costs 1, or its tokens, or its seconds. The reference reads every pair once
and forward only, which is a third of the work of training: a backward pass costs twice a forward
pass (arXiv:2001.08361, section 2.1). Evaluations are the same for all methods and cost nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orpo_ray.config import RunConfig, stage_configs
from orpo_ray.config.compare import BudgetConfig
from orpo_ray.config.contenders import settings_of
from orpo_ray.errors import ConfigError
from orpo_ray.training.plan import Indices, step_pairs

FORWARD = 1 / 3
"""The share of a pair's cost that its forward pass has."""
_OFF = 0.02
"""No method may use more or less of the budget than this share."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a method does with the budget: the steps of each stage, and what all of it costs.

    `reference` is the part of `used` that references cost.
    """

    steps: tuple[int, ...]
    used: float
    reference: float = 0.0


def share(
    run: RunConfig, budget: BudgetConfig, lengths: Indices, speeds: Sequence[float] = ()
) -> Share:
    """How a method spends a budget over training pairs with (prompt, chosen, rejected) tokens.

    References are paid first, and the stages share the rest equally. `speeds` has the pairs a
    second of each stage, for a budget in seconds. Raises ConfigError if the budget is too small for
    the references, or if no number of whole steps comes near it.
    """
    stages = stage_configs(run) or [run]
    costs = [
        _costs(stage, budget, lengths, speeds[number] if speeds else 0.0)
        for number, stage in enumerate(stages)
    ]
    fixed = sum(
        FORWARD * float(cost.sum())
        for stage, cost in zip(stages, costs, strict=True)
        if stage.objective.needs_reference
    )
    left = budget.amount - fixed
    if left <= 0:
        raise ConfigError(
            f"compare.budget: the reference alone reads {fixed:,.0f} {budget.unit}, and there are "
            f"{budget.amount:,.0f}; raise the budget"
        )
    steps, used = [], fixed
    for number, (stage, cost) in enumerate(zip(stages, costs, strict=True)):
        # What an earlier stage has left over, or taken too much, is the next one's.
        allowed = (budget.amount - used) / (len(stages) - number)
        count, spent = _steps(stage, cost, allowed)
        steps.append(count)
        used += spent
    if abs(used / budget.amount - 1) > _OFF:
        raise ConfigError(
            f"compare.budget: {budget.amount:,.0f} {budget.unit} are no whole number of steps of "
            f"{stages[0].training.pairs_per_step} pairs to {_OFF:.0%} ({used:,.0f} are the "
            "nearest); raise the budget, or lower training.pairs_per_step"
        )
    return Share(steps=tuple(steps), used=used, reference=fixed)


def budget_of(config: RunConfig, pairs: int) -> BudgetConfig:
    """What every method of a comparison may use: as its config says, or one epoch of the pairs."""
    return settings_of(config).budget or BudgetConfig(pairs=pairs)


def _costs(
    stage: RunConfig, budget: BudgetConfig, lengths: Indices, speed: float
) -> NDArray[np.float64]:
    """What it costs to train each pair once."""
    if budget.unit == "tokens":
        sides = 3 if stage.objective.needs_rejected else 2
        tokens: NDArray[np.float64] = lengths[:, :sides].sum(axis=1).astype(np.float64)
        return tokens
    return np.full(len(lengths), 1.0 if budget.unit == "pairs" else 1 / speed)


def _steps(stage: RunConfig, costs: NDArray[np.float64], allowed: float) -> tuple[int, float]:
    """The number of steps, at least one, whose cost is nearest to what is allowed."""
    settings, spent, count, epoch = stage.training, 0.0, 0, 0
    while True:
        for pairs in step_pairs(len(costs), settings.pairs_per_step, settings.seed, epoch):
            cost = float(costs[pairs].sum())
            if count and spent + cost / 2 > allowed:
                return count, spent
            spent, count = spent + cost, count + 1
        epoch += 1
