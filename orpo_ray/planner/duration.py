"""How long a run takes: its steps pack by pack, and all that happens beside them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orpo_ray.config import RunConfig
from orpo_ray.config.search import SearchConfig
from orpo_ray.config.training import every_to_steps
from orpo_ray.planner.engine import Engine
from orpo_ray.planner.fit import Request
from orpo_ray.planner.hardware import Gpu
from orpo_ray.planner.interval import Interval
from orpo_ray.planner.lengths import Lengths
from orpo_ray.planner.memory import MicroBatch, state_bytes, trained_numbers
from orpo_ray.planner.network import Weights, Workers, exchanges, step_cost
from orpo_ray.training.plan import Indices, cut_step
from orpo_ray.training.sampling import SAMPLE_TOKENS

_SAMPLED_STEPS = 8
BACKWARD = 0.5
"""The share of a pack's time that is its backward pass; with recomputing it is a little more."""
_DISK = (2e8, 2e9)
"""Bytes a second of a disk, from a network disk to an NVMe."""
_START = Interval(20.0, 60.0, 180.0)
"""Seconds for Python, torch, CUDA and the first micro-batches that are tried."""
_START_OF_RAY = Interval(10.0, 20.0, 60.0)
_CHECKPOINT = Interval(1.0, 3.0, 10.0)
"""Seconds of a checkpoint besides writing its bytes: reports, and the storage's answers."""


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Seconds of a run, in all and by part."""

    seconds: Interval
    parts: dict[str, Interval]
    steps: int


class Steps:
    """How long the steps of a run take on one kind of GPU."""

    def __init__(
        self, request: Request, engine: Engine, gpu: Gpu, workers: Workers, pairs_per_step: int
    ) -> None:
        self._request, self._gpu, self._pairs_per_step = request, gpu, pairs_per_step
        self.engine, self.workers = engine, workers
        self._parts = exchanges(engine.method.stage, trained_weights(engine))

    def step(self, tokens: int) -> Interval:
        """Seconds of a step, on average, with that many tokens in a micro-batch."""
        rng = np.random.default_rng(0)
        count = len(self._request.lengths)
        size = self._pairs_per_step
        drawn = [rng.choice(count, size, replace=count < size) for _ in range(_SAMPLED_STEPS)]
        return _mean([self._one(pairs.astype(np.int64), tokens) for pairs in drawn])

    def _one(self, pairs: Indices, tokens: int) -> Interval:
        step = cut_step(pairs, self._request.costs, self.workers.count, tokens)
        ranks = [
            [self._pack(tuple(pack.pairs.tolist())) for pack in rank if pack.weight]
            for rank in step.packs
        ]
        times = [Interval.total(packs) for packs in ranks if packs]
        slowest = max(times, key=lambda time: time.middle)
        packs = len(step.packs[0])
        last = slowest.times(BACKWARD / packs)
        rate = self.workers.rate if self.workers.count > 1 else None
        waits = [
            step_cost(self._parts, self.workers, packs, backward, speed).exposed if rate else 0.0
            for backward, speed in zip(
                (last.low, last.middle, last.high),
                (rate.high, rate.middle, rate.low) if rate else (1.0, 1.0, 1.0),
                strict=True,
            )
        ]
        own = Interval.sure(self.engine.step_seconds(self._gpu))
        return slowest + Interval(*waits) + own

    def _pack(self, pairs: tuple[int, ...]) -> Interval:
        batch = self._request.batch(np.array(pairs, dtype=np.int64))
        return self.engine.seconds(batch, self._gpu)

    def forward(self, pairs: int, tokens: int) -> Interval:
        """Seconds of the forward passes of so many pairs, shared by all workers."""
        costs = self._request.costs
        mean = float(costs.tokens.mean())
        sample = np.arange(min(len(costs.tokens), max(1, int(tokens // mean))))
        batch = self._request.batch(sample)
        one = self.engine.seconds(batch, self._gpu, training=False)
        return one.times(pairs / len(sample) / self.workers.count)

    def answers(self, count: int) -> Interval:
        """Seconds of the samples of an evaluation, which the first worker writes side by side.

        Each token of them is a forward pass. All are counted with their full length.
        """
        if not count or self.engine.method.stage == 3:
            return Interval.sure(0.0)
        prompt = round(float(self._request.lengths[:, 0].mean()))
        batch = MicroBatch(tokens=count, scored=count, seen=count * prompt)
        return self.engine.seconds(batch, self._gpu, training=False).times(SAMPLE_TOKENS)


def trained_weights(engine: Engine) -> Weights:
    """What the workers of a run exchange of its weights."""
    shape, method = engine.shape, engine.method
    frozen = 0 if method.rank is None else shape.total
    return Weights(
        trained=trained_numbers(shape, method),
        frozen_bytes=frozen * method.number,
        layers=shape.layers,
    )


def duration(
    config: RunConfig, lengths: Lengths, steps: Steps, tokens: int, step: Interval
) -> Duration | None:
    """How long a run takes whose step takes `step`; None if nobody knows how many pairs it has."""
    settings, engine, workers = config.training, steps.engine, steps.workers.count
    if lengths.pairs is None and settings.max_steps is None:
        return None
    pairs = lengths.pairs or settings.pairs_per_step
    per_epoch = math.ceil(pairs / settings.pairs_per_step)
    count = settings.max_steps or max(1, round((settings.epochs or 1) * per_epoch))
    share = pairs / (per_epoch * settings.pairs_per_step)
    # The last step counts, whatever its number; before the first one a run evaluates, too.
    evaluations = math.ceil(count / every_to_steps(settings.eval_every, count)) + 1
    checkpoints = math.ceil(count / every_to_steps(settings.checkpoint_every, count))
    evaluation = steps.forward(lengths.held_out, tokens) + steps.answers(settings.samples)
    parts = {
        "start": _start(engine, workers),
        "steps": step.times(count * share),
        "evaluation": evaluation.times(evaluations),
        "checkpoints": (_written(checkpoint_bytes(engine)) + _CHECKPOINT).times(checkpoints),
    }
    if config.objective.needs_reference:
        passes = steps.forward(pairs + lengths.held_out, tokens)
        parts["reference"] = passes + _start(engine, workers)
    return Duration(seconds=Interval.total(parts.values()), parts=parts, steps=count)


def _start(engine: Engine, workers: int) -> Interval:
    """Seconds until the first step: programs start, and the base is read from the disk."""
    start = _START if workers == 1 else _START + _START_OF_RAY
    return start + _written(2 * engine.shape.total)


def _written(size: float) -> Interval:
    slow, fast = _DISK
    return Interval(size / fast, size / math.sqrt(fast * slow), size / slow)


def checkpoint_bytes(engine: Engine) -> float:
    """Bytes of a checkpoint: float32 weights that are trained, their state, and the adapter."""
    trained = trained_numbers(engine.shape, engine.method)
    return 2 * 4.0 * trained + state_bytes(engine.shape, engine.method, trained)


def search_seconds(run: Sequence[Duration], search: SearchConfig, trials: int) -> Interval:
    """How long a search takes: every trial starts, and the reference is computed once for all."""
    share, total = search_share(search, trials), Interval.sure(0.0)
    for stage in run:
        for name, part in stage.parts.items():
            if name == "start":
                total += part.times(trials)
            elif name == "reference":
                total += part
            else:
                total += Interval(
                    trials * share.low * part.low,
                    trials * share.middle * part.middle,
                    trials * share.high * part.high,
                )
    return total


def search_share(search: SearchConfig, trials: int) -> Interval:
    """How much of all trials' full length a search computes, on average.

    ASHA runs each trial for `grace`; the best 1/eta of them go on to eta times grace, and so on.
    The high end is for searches whose early trials go further, because there are none to compare
    with yet: `orpo-ray bench search` measured 1.2 of the middle (docs/benchmarks.md).
    """
    if search.scheduler == "none" or trials < search.eta:
        return Interval.sure(1.0)
    share, reached, alive = search.grace, search.grace, 1.0
    while reached < 1:
        alive /= search.eta
        further = min(1.0, reached * search.eta)
        share += alive * (further - reached)
        reached = further
    return Interval(share, min(1.0, 1.2 * share), min(1.0, 1.4 * share))


def _mean(intervals: Sequence[Interval]) -> Interval:
    return Interval.total(intervals).times(1 / len(intervals))
