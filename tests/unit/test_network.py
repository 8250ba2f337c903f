"""What workers exchange in a step by strategy, and how long it takes: held against hand arithmetic.

tests/cluster/test_exchange.py holds it against real runs.
"""

import math

import pytest

from orpo_ray.planner.hardware import Link, find_network, find_server_link, load_gpus
from orpo_ray.planner.network import (
    Exchange,
    Weights,
    Workers,
    call_seconds,
    exchanges,
    exposed_seconds,
    step_cost,
    usable_rate,
)

ADAPTER = Weights(trained=42_000_000, frozen_bytes=14_000_000_000, layers=32)
MIB = 2**20
SLOW, FAST = Link("slow", 1e6, 0.0), Link("fast", 1e9, 0.0)


def sent(stage: int | None, weights: Weights, workers: int, packs: int) -> float:
    return sum(part.sent(workers, packs) for part in exchanges(stage, weights))


def alone_on_servers(servers: int, network: Link) -> Workers:
    return Workers(servers=servers, per_server=1, inside=None, network=network)


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packs", [1, 5])
@pytest.mark.parametrize(("workers", "share"), [(2, 1.0), (4, 1.5), (8, 1.75)])
def test_ddp_sends_its_gradients_nearly_twice_whatever_the_packs(
    workers: int, share: float, packs: int
) -> None:
    assert sent(None, ADAPTER, workers, packs) == pytest.approx(share * 4 * 42_000_000)


@pytest.mark.parametrize(
    ("stage", "gradients", "weights"),
    [
        (0, 1.5, 0.0),
        (1, 1.5, 0.75),
        (2, 3 * 1.5, 0.75),
    ],
)
def test_zero_adds_the_updated_weights_and_zero_2_reduces_every_pack(
    stage: int, gradients: float, weights: float
) -> None:
    assert sent(stage, ADAPTER, 4, 3) == pytest.approx((gradients + weights) * 4 * 42_000_000)


def test_zero_3_gathers_the_base_twice_in_every_pack() -> None:
    [weights, gradients] = exchanges(3, ADAPTER)
    assert weights.sent(4, 3) == pytest.approx(3 * 0.75 * 2 * (4 * 42e6 + 14e9))
    assert gradients.sent(4, 3) == pytest.approx(3 * 0.75 * 4 * 42e6), "scattered, not reduced"
    assert len(weights.calls) == 2 * 32, "the layers one by one"


def test_buckets_are_those_of_torch() -> None:
    [part] = exchanges(None, Weights(trained=64 * MIB // 4))
    assert part.calls == (1 * MIB, 25 * MIB, 25 * MIB, 13 * MIB)
    [part] = exchanges(None, Weights(trained=1000))
    assert part.calls == (4000,)


# --- rates ----------------------------------------------------------------------------------------


def test_ethernet_loses_headers_and_fast_ethernet_more() -> None:
    one, ten, hundred = (usable_rate(find_network(f"{rate}gbit")) for rate in (1, 10, 100))
    assert (one.low, one.high) == pytest.approx((110e6, 117.5e6))
    assert (ten.low, ten.high) == pytest.approx((1.1e9, 1.175e9))
    assert (hundred.low, hundred.high) == pytest.approx((4e9, 6e9))
    assert one.low < one.middle < one.high and "1448 of the 1538" in one.reason


def test_every_known_link_reaches_less_than_its_name() -> None:
    links = [find_server_link(gpu.link) for gpu in load_gpus().values()]
    links += [find_network(name) for name in ("infiniband-hdr", "infiniband-ndr", "25gbit")]
    for link in links:
        rate = usable_rate(link)
        assert 0 < rate.low < rate.high < link.rate
        assert ("1448 of" in rate.reason) <= link.name.endswith("gbit"), "each has its own line"


def test_the_slowest_link_of_the_ring_decides() -> None:
    inside, network = find_server_link("nvlink4"), find_network("1gbit")
    for servers, decides in ((1, inside), (2, network)):
        workers = Workers(servers=servers, per_server=8, inside=inside, network=network)
        assert workers.rate.middle == pytest.approx(usable_rate(decides).middle)


def test_a_server_sends_as_much_as_a_worker_whatever_its_gpus() -> None:
    """So eight GPUs a server exchange over the network as fast as one."""
    [part] = exchanges(None, ADAPTER)
    inside, network = find_server_link("nvlink4"), Link("1gbit", 125e6, 0.0)
    many = Workers(servers=8, per_server=8, inside=inside, network=network)
    few = alone_on_servers(64, network)
    seconds = [
        step_cost([part], workers, 1, 0.0, workers.rate.middle).total for workers in (many, few)
    ]
    assert seconds[0] == pytest.approx(seconds[1], rel=0.01)


# --- seconds --------------------------------------------------------------------------------------


def test_a_ring_takes_its_bytes_and_its_hops() -> None:
    workers = alone_on_servers(4, Link("net", 1e6, 0.01))
    reduced = call_seconds(8e6, 2, workers, 1e6)
    assert (reduced.moving, reduced.latency) == pytest.approx((2 * 3 / 4 * 8, 2 * 3 * 0.01))
    gathered = call_seconds(8e6, 1, workers, 1e6)
    assert gathered.all == pytest.approx(3 / 4 * 8 + 3 * 0.01)


def test_hops_inside_servers_are_quicker_than_between_them() -> None:
    workers = Workers(
        servers=2, per_server=4, inside=Link("in", 1e9, 0.001), network=Link("net", 1e6, 0.1)
    )
    assert workers.around == pytest.approx(6 * 0.001 + 1 * 0.1)


def test_many_workers_reduce_small_tensors_by_a_tree() -> None:
    workers = alone_on_servers(64, Link("net", 1e9, 0.001))
    small, large = (call_seconds(size, 2, workers, 1e9) for size in (1e3, 1e9))
    assert small.latency == pytest.approx(2 * math.log2(64) * 0.001)
    assert large.latency == pytest.approx(2 * 63 * 0.001)
    gathered = call_seconds(1e3, 1, workers, 1e9)
    assert gathered.latency == pytest.approx(63 * 0.001), "there is no tree that gathers"


def test_buckets_hide_behind_the_backward_pass_except_for_the_last() -> None:
    sizes = [1.0, 1.0, 1.0, 1.0]
    assert exposed_seconds(sizes, [1, 1, 1, 1], 0.0) == pytest.approx(4)
    assert exposed_seconds(sizes, [1, 1, 1, 1], 100.0) == pytest.approx(1)
    # They are full at 1, 2, 3 and 4. The first runs from 1 to 3, and so on until 9.
    assert exposed_seconds(sizes, [2, 2, 2, 2], 4.0) == pytest.approx(9 - 4)


def test_only_what_overlaps_is_hidden() -> None:
    workers = alone_on_servers(2, SLOW)
    [ddp] = exchanges(None, Weights(trained=50 * MIB))
    zero = exchanges(2, Weights(trained=50 * MIB))
    hidden, waited = (step_cost(parts, workers, 2, 1000.0, 1e6) for parts in ([ddp], zero))
    assert hidden.exposed < 0.2 * hidden.total
    assert waited.exposed == waited.total == pytest.approx((2 + 0.5) * 4 * 50 * MIB / 1e6)


def test_one_worker_exchanges_nothing() -> None:
    for stage in (None, 0, 1, 2, 3):
        cost = step_cost(exchanges(stage, ADAPTER), alone_on_servers(1, FAST), 4, 1.0, 1e6)
        assert (cost.total, cost.exposed, cost.latency) == (0, 0, 0)


def test_latency_is_a_part_of_what_is_waited_for() -> None:
    workers = alone_on_servers(4, Link("far", 1e9, 0.1))
    part = Exchange(
        what="gradients", calls=(4e6,), passes=1, every_pack=True, overlaps=False, reason=""
    )
    cost = step_cost([part], workers, 3, 0.0, 1e9)
    assert cost.latency == pytest.approx(3 * 3 * 0.1)
    assert cost.exposed - cost.latency == pytest.approx(3 * 3 / 4 * 4e6 / 1e9)
