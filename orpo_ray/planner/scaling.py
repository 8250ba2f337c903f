"""How a run grows with its nodes: steps simulated with their packs, stragglers and exchanges.

Pure, and the same for the same seed. `share`, which makes packs, and `seconds`, which times them,
come from outside: the first is the plan that a run itself follows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from orpo_ray.planner.hardware import Link, find_network
from orpo_ray.planner.network import Exchange, Workers, step_cost

Tokens = NDArray[np.int64]
Share = Callable[[Tokens, int], Tokens]
"""Takes the tokens of a step's pairs, [n], and the number of workers.

Returns the tokens of each worker's packs, [workers, packs].
"""

_GPU_SPREAD = 0.02
"""Standard deviation of the speed of equal GPUs: four of them are 8 %.

8 % is the average variation between GPUs of one model in a cluster (Sinha et al. 2022,
arXiv:2208.11035; at most 22 %). A GPU keeps its speed, so the slowest one holds up every step.
"""
_FEWEST_STEPS, _MOST_STEPS, _MOST_PARTS = 3, 12, 10_000
"""Steps of a simulation: fewer where the pairs and workers of all are more than `_MOST_PARTS`."""
_WORTH = 0.1
"""What takes less than this share of a step is not worth a change."""
NETWORKS = ("1gbit", "10gbit", "25gbit", "100gbit", "infiniband-hdr", "infiniband-ndr")
"""Networks that a run may move to, by nominal rate."""


class Limit(StrEnum):
    """What takes most of the time that a node more does not save."""

    COMPUTE = "compute"
    PACKS = "packs"
    STRAGGLERS = "stragglers"
    NETWORK = "network"
    LATENCY = "latency"


_REASONS = {
    Limit.COMPUTE: "the workers compute nearly all of the time",
    Limit.PACKS: "a step has too few pairs: packs are not full, unequal, or fewer than workers",
    Limit.STRAGGLERS: "workers wait for the slowest of their equal GPUs",
    Limit.NETWORK: "workers wait for bytes of the exchange",
    Limit.LATENCY: "workers wait for messages of the exchange to arrive, however small they are",
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run whose nodes are counted.

    `tokens` are those of each pair in its layout, `token_budget` the most of a pack. `seconds` is
    what a GPU takes for a pack of so many tokens, forward and backward; `backward` is the share of
    the backward pass. `inside` joins the `per_server` GPUs of a node, `network` the nodes.
    """

    tokens: Tokens
    pairs_per_step: int
    token_budget: int
    share: Share
    seconds: Callable[[int], float]
    backward: float
    exchanges: tuple[Exchange, ...]
    per_server: int
    inside: Link | None
    network: Link
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A run on a number of nodes.

    `pairs_per_second` is for the middle of the rate that the network may reach; `low` and `high`
    are for its ends. `efficiency` is against one node. `exchanged` is the share of a step in which
    workers wait for the exchange. `sent` is what each node sends over the network in a step.
    """

    nodes: int
    workers: int
    pairs_per_second: float
    low: float
    high: float
    efficiency: float
    exchanged: float
    sent: float
    limit: Limit
    reason: str


@dataclass(frozen=True, kw_only=True)
class Payoff:
    """From which number of nodes a change pays, and what it gives there.

    `share` is what it is worth a change for: of a step in exchange, or of a full pack that each
    worker has. `change` names it; `gain` is the factor on pairs a second.
    """

    nodes: int
    share: float
    change: str
    gain: float


@dataclass(frozen=True, kw_only=True)
class _Step:
    """The shared-out packs of one step, in seconds of an average GPU."""

    packs: NDArray[np.float64]
    full: float


@dataclass(frozen=True, kw_only=True)
class _Times:
    """Seconds of a step, on average: in all, and the parts of which more nodes save none."""

    total: float
    packs: float
    stragglers: float
    exchange: float
    latency: float


def scale(setup: Setup, nodes: Sequence[int]) -> list[Scale]:
    """A run on each of these numbers of nodes."""
    alone = _Simulation(setup, 1).speed()
    return [_scale(_Simulation(setup, count), alone) for count in nodes]


def faster_network(setup: Setup, nodes: Sequence[int]) -> Payoff | None:
    """The fewest nodes at which workers wait for the exchange for a tenth of a step.

    What the next faster network gives there. None if that is so nowhere, or if there is none.
    """
    faster = [link for link in map(find_network, NETWORKS) if link.rate > setup.network.rate]
    for count in nodes if faster else ():
        here = _Simulation(setup, count)
        times = here.times(here.workers.rate.middle)
        if count > 1 and times.exchange > _WORTH * times.total:
            moved = _Simulation(replace(setup, network=faster[0]), count)
            return Payoff(
                nodes=count,
                share=times.exchange / times.total,
                change=faster[0].name,
                gain=moved.speed() / here.speed(),
            )
    return None


def larger_step(setup: Setup, nodes: Sequence[int]) -> Payoff | None:
    """The fewest nodes at which a worker has less than one full pack a step.

    What twice the pairs a step give there. That changes what a run learns: fewer, larger steps.
    """
    step = float(setup.tokens.mean()) * setup.pairs_per_step
    for count in nodes:
        here = _Simulation(setup, count)
        share = step / here.workers.count / setup.token_budget
        if share < 1:
            doubled = replace(setup, pairs_per_step=2 * setup.pairs_per_step)
            return Payoff(
                nodes=count,
                share=share,
                change=f"pairs_per_step {doubled.pairs_per_step}",
                gain=_Simulation(doubled, count).speed() / here.speed(),
            )
    return None


class _Simulation:
    """Some steps of a run on a number of nodes; their pairs are the same for every network."""

    def __init__(self, setup: Setup, nodes: int) -> None:
        self.setup, self.nodes = setup, nodes
        self.workers = Workers(
            servers=nodes,
            per_server=setup.per_server,
            inside=setup.inside,
            network=setup.network,
        )
        most = _MOST_PARTS // (setup.pairs_per_step + self.workers.count)
        rng = np.random.default_rng(setup.seed)
        count = max(_FEWEST_STEPS, min(_MOST_STEPS, most))
        self.steps = [_step(setup, rng, self.workers.count) for _ in range(count)]
        self._slowness = _slowness(self.workers.count, setup.seed)

    def speed(self, rate: float | None = None) -> float:
        """Pairs a second, if the exchange has that rate, or else the middle one of its link."""
        rate = self.workers.rate.middle if rate is None else rate
        return self.setup.pairs_per_step / self.times(rate).total

    def times(self, rate: float) -> _Times:
        """Of a step, if the exchange has that rate."""
        return _mean([self._times(step, rate) for step in self.steps])

    def _times(self, step: _Step, rate: float) -> _Times:
        parts, workers = self.setup.exchanges, self.workers
        taken = step.packs * self._slowness[:, np.newaxis]
        meets = workers.count > 1 and any(part.every_pack for part in parts)
        compute, last = _slowest(taken, meets)
        cost = step_cost(parts, workers, taken.shape[1], self.setup.backward * last, rate)
        on_equal_gpus, _ = _slowest(step.packs, meets)
        return _Times(
            total=compute + cost.exposed,
            packs=on_equal_gpus - step.full,
            stragglers=compute - on_equal_gpus,
            exchange=cost.exposed,
            latency=cost.latency,
        )


def _scale(here: _Simulation, alone: float) -> Scale:
    rate = here.workers.rate
    times = here.times(rate.middle)
    limit = _limit(times)
    return Scale(
        nodes=here.nodes,
        workers=here.workers.count,
        pairs_per_second=here.speed(),
        low=here.speed(rate.low),
        high=here.speed(rate.high),
        efficiency=here.speed() / (here.nodes * alone),
        exchanged=times.exchange / times.total,
        sent=0.0 if here.nodes == 1 else _sent(here),
        limit=limit,
        reason=_REASONS[limit],
    )


def _sent(here: _Simulation) -> float:
    """Bytes that a node sends in a step, on average."""
    packs = float(np.mean([step.packs.shape[1] for step in here.steps]))
    return sum(part.sent(here.workers.count, packs) for part in here.setup.exchanges)


def _mean(times: list[_Times]) -> _Times:
    names = [field.name for field in fields(_Times)]
    return _Times(**{name: float(np.mean([getattr(t, name) for t in times])) for name in names})


def _slowest(taken: NDArray[np.float64], meets: bool) -> tuple[float, float]:
    """Seconds until all workers have computed their packs, [workers, packs], and of the last pack.

    If they meet after every pack, all wait for the slowest one each time.
    """
    if meets:
        return float(taken.max(axis=0).sum()), float(taken[:, -1].max())
    worker = int(taken.sum(axis=1).argmax())
    return float(taken[worker].sum()), float(taken[worker, -1])


def _step(setup: Setup, rng: np.random.Generator, workers: int) -> _Step:
    tokens = rng.choice(setup.tokens, setup.pairs_per_step)
    packs = setup.share(tokens, workers)
    seconds = np.array([[setup.seconds(int(size)) for size in row] for row in packs])
    full = setup.seconds(setup.token_budget) * float(tokens.sum()) / setup.token_budget / workers
    return _Step(packs=seconds, full=full)


def _slowness(workers: int, seed: int) -> NDArray[np.float64]:
    """Factors on the seconds of each worker: a worker has the same with any number of others."""
    normal = np.random.default_rng([seed, 1]).standard_normal(workers)
    factors: NDArray[np.float64] = np.exp(_GPU_SPREAD * normal)
    return factors


def _limit(times: _Times) -> Limit:
    """The largest part, unless all of them together are not worth a change."""
    parts = {
        Limit.PACKS: times.packs,
        Limit.STRAGGLERS: times.stragglers,
        Limit.NETWORK: times.exchange - times.latency,
        Limit.LATENCY: times.latency,
    }
    if sum(parts.values()) < _WORTH * times.total:
        return Limit.COMPUTE
    return max(parts, key=lambda limit: parts[limit])
