"""A planned run on more and more servers: what `scaling.py` simulates, from a plan."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from orpo_ray.planner.duration import trained_weights
from orpo_ray.planner.engine import Engine
from orpo_ray.planner.hardware import find_server_link
from orpo_ray.planner.memory import MicroBatch
from orpo_ray.planner.network import Weights, exchanges
from orpo_ray.planner.plan import GpuPlan, Paper
from orpo_ray.planner.scaling import Payoff, Setup, Tokens, faster_network, larger_step, scale
from orpo_ray.training.plan import PackCosts, cut_step, pack_costs


def scaled(paper: Paper, plan: GpuPlan, most: int) -> dict[str, Any]:
    """Pairs a second and efficiency by servers, for the run's own gradients and for all of them."""
    stage = plan.stages[-1]
    assert stage.fit.tokens is not None, "only a run that fits is scaled"
    engine = Engine(paper.shape, stage.fit.method)
    objective = paper.config.objective
    costs = pack_costs(
        paper.lengths.lengths, stage.fit.method.layout, with_rejected=objective.needs_rejected
    )
    setup = Setup(
        tokens=costs.tokens,
        pairs_per_step=paper.config.training.pairs_per_step,
        token_budget=stage.fit.tokens,
        share=_share(costs, stage.fit.tokens),
        seconds=_seconds(engine, costs, paper, plan),
        backward=0.5,
        exchanges=exchanges(stage.fit.method.stage, trained_weights(engine)),
        per_server=paper.place.count,
        inside=find_server_link(plan.gpu.link) if paper.place.count > 1 else None,
        network=paper.place.network,
    )
    whole = replace(setup, exchanges=exchanges(None, Weights(trained=paper.shape.total)))
    nodes = _nodes(paper.place.nodes, most)
    return {
        "gpu": plan.gpu.name,
        "network": paper.place.network.name,
        "trained": _table(setup, nodes),
        "every_weight": _table(whole, nodes),
    }


def _table(setup: Setup, nodes: Sequence[int]) -> dict[str, Any]:
    return {
        "nodes": [asdict(each) for each in scale(setup, nodes)],
        "faster_network": _payoff(faster_network(setup, nodes)),
        "larger_step": _payoff(larger_step(setup, nodes)),
    }


def _payoff(found: Payoff | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


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
