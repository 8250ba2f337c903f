"""What workers exchange in a step, and how long their links take for it.

The exchanges are those of our settings (training/arguments.py, training/zero.py), read in torch
2.13 and DeepSpeed 0.19.8. Ranks are sorted by server (Ray Train does so), so a ring of all workers
leaves each server once: a server sends as much as one worker, whatever the number of its GPUs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from orpo_ray.planner.hardware import Link

_FLOAT = 4
"""Bytes of a trained weight and of its gradient: both are float32 in every number format."""
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20
"""Bytes of DDP's buckets: torch's defaults."""
_ZERO_BUCKET = 500_000_000 * _FLOAT
"""Bytes that DeepSpeed reduces at once: its default `reduce_bucket_size`."""
_TREE_SHARE = 0.9
"""A tree reaches this share of a ring's rate: NCCL's own model, src/graph/tuning.cc."""
_GIGA, _GIGABIT = 1e9, 1e9 / 8


@dataclass(frozen=True)
class Rate:
    """Bytes a second that collective operations move over a link, as an interval."""

    low: float
    high: float
    reason: str

    @property
    def middle(self) -> float:
        """The rate of a single answer: the geometric mean."""
        return math.sqrt(self.low * self.high)


def usable_rate(link: Link) -> Rate:
    """What is left of a link's nominal rate for the payload of collective operations."""
    table = _table()
    entry = table["links"].get(link.name)
    if entry is None:
        gbit = link.rate / _GIGABIT
        entry = next(line for line in table["ethernet"] if gbit <= line["up_to_gbit"])
    most = entry.get("most", (math.inf, math.inf))
    low, high = (
        min(share * link.rate, limit * _GIGA)
        for share, limit in zip(entry["share"], most, strict=True)
    )
    return Rate(low, high, table["sources"][entry["source"]])


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model as its workers exchange it.

    `trained` counts numbers; `frozen_bytes` are the bytes of all others. `layers` counts the blocks
    that ZeRO-3 gathers one by one.
    """

    trained: int
    frozen_bytes: int = 0
    layers: int = 1


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One kind of exchange between all workers.

    `calls` are the bytes of the whole tensor of each collective operation. `passes` is how often
    they go around the ring: 2 to reduce for all (all-reduce), 1 to gather or to scatter. With
    `every_pack` it happens in each pack, else once a step. With `overlaps` it runs beside the
    backward pass of the last pack, otherwise the GPU waits for it.
    """

    what: str
    calls: tuple[float, ...]
    passes: int
    every_pack: bool
    overlaps: bool
    reason: str

    def sent(self, workers: int, packs: float) -> float:
        """Bytes that each worker sends in a step of so many packs."""
        times = packs if self.every_pack else 1
        return times * self.passes * (workers - 1) / workers * sum(self.calls)


def exchanges(stage: int | None, weights: Weights) -> tuple[Exchange, ...]:
    """What workers exchange with a stage of ZeRO, or with DDP if `stage` is None."""
    gradients = _FLOAT * weights.trained
    if stage is None:
        return (
            Exchange(
                what="gradients",
                calls=_buckets(gradients, _FIRST_BUCKET, _BUCKET),
                passes=2,
                every_pack=False,
                overlaps=True,
                reason="DDP reduces buckets beside the backward pass of the last pack of a step",
            ),
        )
    if stage == 3:
        return _zero_3(weights, gradients)
    reduced = Exchange(
        what="gradients",
        calls=_buckets(gradients, _ZERO_BUCKET, _ZERO_BUCKET),
        passes=2,
        every_pack=stage == 2,
        overlaps=False,
        reason=f"ZeRO-{stage} all-reduces whole buckets, {_WHEN[stage]}; overlap_comm is off",
    )
    return (reduced,) if stage == 0 else (reduced, _updated(gradients))


_WHEN = ("at the last pack", "at the last pack", "in every pack")


def _updated(size: float) -> Exchange:
    return Exchange(
        what="updated weights",
        calls=(size,),
        passes=1,
        every_pack=False,
        overlaps=False,
        reason="each worker updates its part and sends it to all",
    )


def _zero_3(weights: Weights, gradients: float) -> tuple[Exchange, ...]:
    layer = (gradients + weights.frozen_bytes) / weights.layers
    gathered = Exchange(
        what="weights",
        calls=(layer,) * (2 * weights.layers),
        passes=1,
        every_pack=True,
        overlaps=False,
        reason="ZeRO-3 gathers all weights in the forward and again in the backward pass of every "
        "pack; overlap_comm is off",
    )
    scattered = Exchange(
        what="gradients",
        calls=_buckets(gradients, _ZERO_BUCKET, _ZERO_BUCKET),
        passes=1,
        every_pack=True,
        overlaps=False,
        reason="ZeRO-3 scatters reduced gradients in every pack",
    )
    return (gathered, scattered)


def _buckets(size: float, first: float, others: float) -> tuple[float, ...]:
    """Bytes of each bucket; the first one becomes full first."""
    count = max(0, math.ceil((size - first) / others))
    if not count:
        return (size,)
    return (first, *[others] * (count - 1), size - first - (count - 1) * others)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Where workers are: `per_server` of them on each of the servers, and what joins them.

    `inside` joins the GPUs of a server, None if each has one; `network` joins the servers.
    """

    servers: int
    per_server: int
    inside: Link | None
    network: Link

    @property
    def count(self) -> int:
        """All workers."""
        return self.servers * self.per_server

    @property
    def rate(self) -> Rate:
        """That of the slowest link of a ring; of NVLink or PCIe alone if there is one server."""
        rates = [usable_rate(link) for link in self._links]
        slowest = min(rates, key=lambda rate: rate.middle)
        low, high = (min(getattr(rate, end) for rate in rates) for end in ("low", "high"))
        return Rate(low, high, slowest.reason)

    @property
    def _links(self) -> list[Link]:
        inside = [self.inside] if self.inside is not None and self.per_server > 1 else []
        return inside if inside and self.servers == 1 else [*inside, self.network]

    @property
    def around(self) -> float:
        """Seconds of latency once around the ring, which crosses the network between servers."""
        near = 0.0 if self.inside is None else self.inside.latency
        return (self.count - self.servers) * near + (self.servers - 1) * self.network.latency

    @property
    def to_the_root(self) -> float:
        """Seconds of latency from a leaf of a tree: a chain in each server, a tree of servers."""
        near = 0.0 if self.inside is None else self.inside.latency
        return (self.per_server - 1) * near + math.log2(self.servers) * self.network.latency


@dataclass(frozen=True)
class Seconds:
    """What a collective operation takes: for its bytes, and for its messages to arrive."""

    moving: float
    latency: float

    @property
    def all(self) -> float:
        """Both together."""
        return self.moving + self.latency


def call_seconds(size: float, passes: int, workers: Workers, rate: float) -> Seconds:
    """What one collective operation over `size` bytes takes at that rate.

    A ring: passes * (n - 1) / n * size / rate (Patarasu and Yuan 2009), and one latency a hop. An
    all-reduce may also go up and down a tree, whose latency grows with the logarithm of servers;
    NCCL takes the faster one (src/graph/tuning.cc). gloo always takes the ring.
    """
    count = workers.count
    moving = passes * (count - 1) / count * size / rate
    ring = Seconds(moving, passes * workers.around)
    tree = Seconds(2 * size / (_TREE_SHARE * rate), 2 * workers.to_the_root)
    return tree if passes == 2 and tree.all < ring.all else ring


@dataclass(frozen=True)
class Cost:
    """Seconds that the exchanges of a step take.

    `total` with all that runs beside the backward pass, `exposed` without: that much longer is the
    step. `latency` is the part of `exposed` in which messages travel and no byte is waited for.
    """

    total: float
    exposed: float
    latency: float


def step_cost(
    parts: Sequence[Exchange], workers: Workers, packs: int, backward: float, rate: float
) -> Cost:
    """What the exchanges of a step of so many packs cost at that rate.

    `backward` is the time in seconds of the last pack's backward pass.
    """
    costs = [_cost(part, workers, packs, backward, rate) for part in parts]
    return Cost(
        sum(cost.total for cost in costs),
        sum(cost.exposed for cost in costs),
        sum(cost.latency for cost in costs),
    )


def _cost(part: Exchange, workers: Workers, packs: int, backward: float, rate: float) -> Cost:
    if workers.count == 1:
        return Cost(0.0, 0.0, 0.0)
    known = {size: call_seconds(size, part.passes, workers, rate) for size in set(part.calls)}
    calls = [known[size] for size in part.calls]
    times = packs if part.every_pack else 1
    total = times * sum(call.all for call in calls)
    exposed = total
    if part.overlaps:
        exposed = exposed_seconds(part.calls, [call.all for call in calls], backward)
    share = sum(call.latency for call in calls) / sum(call.all for call in calls)
    return Cost(total, exposed, share * exposed)


def exposed_seconds(sizes: Sequence[float], seconds: Sequence[float], backward: float) -> float:
    """How long buckets of those sizes are still exchanged after the backward pass has ended.

    Gradients are taken to be ready evenly over the backward pass, which is so where all layers are
    alike. A bucket waits until it is full and those before it are exchanged.
    """
    whole, ready, free = sum(sizes), 0.0, 0.0
    for size, needed in zip(sizes, seconds, strict=True):
        ready += backward * size / whole
        free = max(free, ready) + needed
    return free - backward


@cache
def _table() -> dict[str, Any]:
    text = files(__package__).joinpath("network.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table
