"""Scaling on paper: runs on more and more nodes, with the plan that a run itself follows."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from orpo_ray.planner.hardware import Link, find_network
from orpo_ray.planner.network import Weights, exchanges
from orpo_ray.planner.scaling import (
    Limit,
    Scale,
    Setup,
    faster_network,
    larger_step,
    scale,
)
from orpo_ray.training.plan import PackCosts, cut_step, step_pairs

Tokens = NDArray[np.int64]
NODES = (1, 2, 4, 8, 16, 32, 64, 128)
BUDGET = 4096
ADAPTER, WHOLE = Weights(trained=42_000_000), Weights(trained=7_200_000_000)
RAGGED = np.ceil(np.random.default_rng(5).lognormal(6.3, 0.6, 4000)).clip(40, 3000)
EQUAL = np.full(100, 512, dtype=np.int64)
INSTANT = Link("instant", 1e18, 0.0)


def packs_of_plan(tokens: Tokens, workers: int, padded: bool = False) -> Tokens:
    """Tokens of the packs that a real run makes, [workers, packs]."""
    costs = PackCosts(tokens, rectangular=padded)
    step = cut_step(np.arange(len(tokens)), costs, workers, BUDGET)
    return np.array([[costs.of(pack.pairs) for pack in rank] for rank in step.packs])


def seconds_of(tokens: int) -> float:
    return tokens / 1000


SETUP = Setup(
    tokens=RAGGED.astype(np.int64),
    pairs_per_step=128,
    token_budget=BUDGET,
    share=packs_of_plan,
    seconds=seconds_of,
    backward=2 / 3,
    exchanges=exchanges(None, ADAPTER),
    per_server=1,
    inside=None,
    network=find_network("10gbit"),
)
EVEN = replace(SETUP, tokens=EQUAL)


def scaled(setup: Setup, nodes: Sequence[int] = NODES, **changed: Any) -> list[Scale]:
    return scale(replace(setup, **changed), nodes)


def test_one_node_computes_and_nothing_else() -> None:
    [row] = scaled(EVEN, [1])
    assert row.pairs_per_second == pytest.approx(128 / (128 * 512 / 1000), rel=0.05)
    assert (row.workers, row.efficiency, row.exchanged, row.sent) == (1, 1.0, 0.0, 0.0)
    assert row.limit is Limit.COMPUTE


def test_two_nodes_wait_for_the_ring_by_hand() -> None:
    """Equal pairs: 8 packs of 4,096 tokens a node. Of ZeRO-1 nothing hides."""
    network = find_network("1gbit")
    [row] = scaled(EVEN, [2], exchanges=exchanges(1, ADAPTER), network=network)
    compute, sent = 8 * 4.096, 1.5 * 4 * 42_000_000
    slowest = compute / (128 / row.pairs_per_second - sent / 113.7e6)
    assert slowest == pytest.approx(1, abs=0.05), "but for the speed of a GPU"
    assert row.sent == pytest.approx(sent)
    assert row.exchanged == pytest.approx(sent / 113.7e6 * row.pairs_per_second / 128, rel=0.01)
    assert row.low < row.pairs_per_second < row.high


def test_the_same_seed_gives_the_same_and_another_one_nearly() -> None:
    assert scaled(SETUP, [1, 8]) == scaled(SETUP, [1, 8])
    for one, other in zip(scaled(SETUP, [1, 8]), scaled(SETUP, [1, 8], seed=1), strict=True):
        assert one != other
        assert one.pairs_per_second == pytest.approx(other.pairs_per_second, rel=0.15)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 16])
def test_the_longest_worker_is_that_of_the_real_plan(nodes: int, padded: bool) -> None:
    """Within 6 %: the simulation is of 12 steps only, and its equal GPUs differ."""
    tokens = SETUP.tokens
    costs = PackCosts(tokens, rectangular=padded)
    steps = [cut_step(pairs, costs, nodes, BUDGET) for pairs in step_pairs(len(tokens), 128, 0, 0)]
    loads = [[sum(costs.of(pack.pairs) for pack in rank) for rank in step.packs] for step in steps]
    real = len(tokens) / sum(max(ranks) / 1000 for ranks in loads)
    share = partial(packs_of_plan, padded=padded)
    [row] = scaled(SETUP, [nodes], share=share, network=INSTANT)
    assert row.pairs_per_second == pytest.approx(real, rel=0.06)


def test_workers_that_meet_in_every_pack_wait_longer() -> None:
    apart, meeting = (
        scaled(SETUP, [8], exchanges=exchanges(stage, ADAPTER), network=INSTANT)[0]
        for stage in (1, 2)
    )
    assert meeting.pairs_per_second < apart.pairs_per_second


def test_more_nodes_never_become_more_efficient() -> None:
    for weights in (ADAPTER, WHOLE):
        rows = scaled(SETUP, exchanges=exchanges(None, weights))
        efficiency = [row.efficiency for row in rows]
        assert efficiency[0] == 1.0 and efficiency == sorted(efficiency, reverse=True)
        assert all(row.low <= row.pairs_per_second <= row.high for row in rows)


# --- what limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "nodes", "limit"),
    [
        ({}, 2, Limit.COMPUTE),
        ({"exchanges": exchanges(None, WHOLE)}, 2, Limit.NETWORK),
        ({"tokens": SETUP.tokens}, 128, Limit.PACKS),
        ({"network": Link("far", 1e12, 2.0)}, 8, Limit.LATENCY),
        (
            {"pairs_per_step": 1024, "exchanges": exchanges(1, Weights(trained=21_000_000))},
            128,
            Limit.STRAGGLERS,
        ),
    ],
)
def test_each_limit_is_told_with_its_reason(
    changed: dict[str, Any], nodes: int, limit: Limit
) -> None:
    [row] = scaled(EVEN, [nodes], **changed)
    assert row.limit is limit, row
    assert len(row.reason) > 30


def test_the_adapter_scales_where_the_whole_model_does_not() -> None:
    [adapter] = scaled(SETUP, [4], network=find_network("1gbit"))
    [whole] = scaled(SETUP, [4], network=find_network("1gbit"), exchanges=exchanges(None, WHOLE))
    assert adapter.efficiency > 0.8 > 0.1 > whole.efficiency
    assert whole.limit is Limit.NETWORK


# --- what pays ------------------------------------------------------------------------------------


def test_a_faster_network_pays_from_the_first_node_that_waits_a_tenth() -> None:
    slow = replace(SETUP, network=find_network("1gbit"))
    rows = scale(slow, NODES)
    first = next(row for row in rows if row.exchanged > 0.1)
    found = faster_network(slow, NODES)
    assert found is not None and found.nodes == first.nodes > 1
    assert found.change == "10gbit" and found.share == pytest.approx(first.exchanged)
    [moved] = scaled(slow, [first.nodes], network=find_network("10gbit"))
    assert found.gain == pytest.approx(moved.pairs_per_second / first.pairs_per_second)
    assert found.gain > 1.05


def test_no_network_pays_where_none_is_faster_or_nobody_waits() -> None:
    fastest = find_network("infiniband-ndr")
    assert faster_network(replace(SETUP, network=fastest), NODES) is None
    assert faster_network(SETUP, [1, 2]) is None


def test_a_larger_step_pays_from_the_first_worker_without_a_full_pack() -> None:
    """128 pairs of 512 tokens are 16 packs of 4,096."""
    found = larger_step(EVEN, NODES)
    assert found is not None and (found.nodes, found.share) == (32, 0.5)
    assert found.change == "pairs_per_step 256" and found.gain > 1
    assert larger_step(EVEN, [1, 2, 4, 8, 16]) is None
