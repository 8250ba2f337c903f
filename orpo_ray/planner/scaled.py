"""A planned run on more and more servers: what `scaling.py` simulates, from a plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from orpo_ray.planner.duration import BACKWARD, trained_weights
from orpo_ray.planner.engine import Engine
from orpo_ray.planner.memory import MicroBatch
from orpo_ray.planner.network import Weights, exchanges
from orpo_ray.planner.plan import GpuPlan, Paper, inside
from orpo_ray.planner.scaling import (
    Payoff,
    Scale,
    Setup,
    Tokens,
    faster_network,
    larger_step,
    scale,
)
from orpo_ray.training.plan import PackCosts, cut_step, pack_costs

_PAYS = 1.05
"""A change that gives less is not worth its words."""


def scaled(paper: Paper, plan: GpuPlan, most: int) -> dict[str, Any]:
    """Pairs a second and efficiency by servers, for the run's own gradients and for all of them.

    Each number of servers has the strategy and the micro-batch that a run on them takes.
    """
    nodes = _nodes(paper.place.nodes, most)
    own = {count: _setup(_on_servers(paper, count), plan) for count in {1, *nodes}}
    every = exchanges(None, Weights(trained=paper.shape.total))
    whole = {count: replace(setup, exchanges=every) for count, setup in own.items()}
    return {
        "gpu": plan.gpu.name,
        "network": paper.place.network.name,
        "trained": _table(own, nodes),
        "every_weight": _table(whole, nodes),
    }


def _on_servers(paper: Paper, count: int) -> Paper:
    return replace(paper, place=replace(paper.place, nodes=count))


def _setup(paper: Paper, plan: GpuPlan) -> Setup:
    """What is simulated: the last stage of a run, on the servers of its paper."""
    config = paper.configs[-1]
    fit = paper.stage(config, plan.gpu).fit
    assert fit.tokens is not None, "what fits into a GPU alone fits beside others"
    engine = Engine(paper.shape, fit.method)
    costs = pack_costs(
        paper.lengths.lengths, fit.method.layout, with_rejected=config.objective.needs_rejected
    )
    return Setup(
        tokens=costs.tokens,
        pairs_per_step=config.training.pairs_per_step,
        token_budget=fit.tokens,
        share=_share(costs, fit.tokens),
        seconds=_seconds(engine, costs, paper, plan),
        backward=BACKWARD,
        exchanges=exchanges(fit.method.stage, trained_weights(engine)),
        per_server=paper.place.count,
        inside=inside(plan.gpu) if paper.place.count > 1 else None,
        network=paper.place.network,
    )


def _table(setups: Mapping[int, Setup], nodes: Sequence[int]) -> dict[str, Any]:
    (alone,) = scale(setups[1], [1])
    found = [scale(setups[count], [count])[0] for count in nodes]
    return {
        "nodes": [
            asdict(replace(each, efficiency=each.pairs_per_second / _linear(alone, each)))
            for each in found
        ],
        "faster_network": _first(faster_network, setups, nodes),
        "larger_step": _first(larger_step, setups, nodes),
    }


def _linear(alone: Scale, each: Scale) -> float:
    """Pairs a second if every server did as much as one alone."""
    return each.nodes * alone.pairs_per_second


def _first(
    look: Callable[[Setup, Sequence[int]], Payoff | None],
    setups: Mapping[int, Setup],
    nodes: Sequence[int],
) -> dict[str, Any] | None:
    """The fewest servers at which a change pays, or None."""
    found = (look(setups[count], [count]) for count in nodes)
    return next((asdict(each) for each in found if each is not None and each.gain >= _PAYS), None)


def _nodes(first: int, most: int) -> list[int]:
    """The first number and its doubles, and the last one."""
    found = [first]
    while found[-1] * 2 < most:
        found.append(found[-1] * 2)
    return [*found, most]


def _share(costs: PackCosts, budget: int) -> Any:
    """How a run shares out the pairs of a step: its own plan."""

    def share(tokens: Tokens, workers: int) -> Tokens:
        own = PackCosts(tokens, costs.rectangular)
        step = cut_step(np.arange(len(tokens), dtype=np.int64), own, workers, budget)
        rows = [[own.of(pack.pairs) if pack.weight else 0 for pack in rank] for rank in step.packs]
        return np.array(rows, dtype=np.int64)

    return share


def _seconds(engine: Engine, costs: PackCosts, paper: Paper, plan: GpuPlan) -> Any:
    """Seconds of a pack by its tokens, for pairs of the usual lengths."""
    lengths, tokens = paper.lengths.lengths, float(costs.tokens.mean())
    scored = float(lengths[:, 1:].sum(axis=1).mean()) / tokens
    seen = float((lengths.sum(axis=1) ** 2).mean()) / 2 / tokens

    def seconds(size: int) -> float:
        batch = MicroBatch(tokens=size, scored=int(scored * size), seen=int(seen * size))
        return engine.seconds(batch, plan.gpu).middle if size else 0.0

    return seconds
