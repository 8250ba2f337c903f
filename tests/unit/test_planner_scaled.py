"""What a planned run is on more servers agrees with the plan itself."""

from typing import Any

import numpy as np
import pytest

from orpo_ray.config import RunConfig, build
from orpo_ray.planner.hardware import find_gpus, find_network
from orpo_ray.planner.lengths import Lengths
from orpo_ray.planner.plan import Paper, Place
from orpo_ray.planner.scaled import scaled
from orpo_ray.planner.shapes import known_shape

(RTX4090,) = find_gpus("rtx4090")


def paper(nodes: int = 1, count: int = 1, network: str = "10gbit", **sections: Any) -> Paper:
    shape = known_shape("Qwen/Qwen2.5-1.5B")
    assert shape is not None
    tree = {
        "name": "p",
        "model": {"base": "Qwen/Qwen2.5-1.5B"},
        "data": {"train": ["owner/pairs"]},
        "training": {"pairs_per_step": 64, "tokens_per_microbatch": 2048},
        **sections,
    }
    rng = np.random.default_rng(0)
    return Paper(
        config=build(RunConfig, tree, {(): "tests"}),
        shape=shape,
        lengths=Lengths(
            lengths=rng.integers(100, 500, (400, 3)), pairs=4000, held_out=50, source="tests"
        ),
        place=Place(nodes=nodes, count=count, network=find_network(network)),
    )


def nodes_of(planned: Paper, most: int, what: str = "trained") -> dict[int, dict[str, Any]]:
    found = scaled(planned, planned.on(RTX4090), most)
    return {row["nodes"]: row for row in found[what]["nodes"]}


@pytest.mark.parametrize(
    ("first", "most", "nodes"),
    [(1, 8, [1, 2, 4, 8]), (1, 6, [1, 2, 4, 6]), (2, 3, [2, 3]), (4, 32, [4, 8, 16, 32])],
)
def test_servers_are_doubled_up_to_the_last_number(first, most, nodes):
    rows = nodes_of(paper(first), most)
    assert list(rows) == nodes
    assert [row["workers"] for row in rows.values()] == nodes


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_a_row_has_the_speed_of_a_plan_on_as_many_servers(nodes):
    row = nodes_of(paper(), 8)[nodes]
    speed = paper(nodes).on(RTX4090).pairs_per_second
    assert speed is not None
    middle = (row["low"] * row["high"]) ** 0.5
    assert middle == pytest.approx(speed.middle, rel=0.15)


def test_every_weight_is_much_more_to_exchange():
    own, every = (nodes_of(paper(), 4, what)[4] for what in ("trained", "every_weight"))
    assert every["efficiency"] < own["efficiency"] <= 1
    assert every["exchanged"] > own["exchanged"]


def test_a_slow_network_names_itself_as_the_limit_and_a_fast_one_pays():
    slow = paper(network="1gbit")
    found = scaled(slow, slow.on(RTX4090), 8)["every_weight"]
    assert found["nodes"][-1]["limit"] == "network"
    assert found["faster_network"] is not None and found["faster_network"]["gain"] > 1
    fast = nodes_of(paper(network="100gbit"), 8)
    assert fast[8]["efficiency"] > nodes_of(slow, 8)[8]["efficiency"]


def test_gpus_of_a_server_count_as_workers():
    rows = nodes_of(paper(count=2), 4)
    assert {nodes: row["workers"] for nodes, row in rows.items()} == {1: 2, 2: 4, 4: 8}
