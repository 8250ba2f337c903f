"""A run on paper: does it fit, how long does it take, and what does it cost, for each GPU."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from orpo_ray.config import RunConfig, stage_configs
from orpo_ray.config.searched import trial_count, with_values
from orpo_ray.errors import ConfigError
from orpo_ray.models.traits import Traits
from orpo_ray.planner.calibration import Calibration
from orpo_ray.planner.changes import changes
from orpo_ray.planner.cost import Prices
from orpo_ray.planner.duration import (
    Duration,
    Steps,
    duration,
    search_seconds,
)
from orpo_ray.planner.engine import Engine
from orpo_ray.planner.fit import Fit, Request, fit
from orpo_ray.planner.hardware import Gpu, Link, find_network, find_server_link, load_gpus
from orpo_ray.planner.here import CPU
from orpo_ray.planner.interval import Interval
from orpo_ray.planner.lengths import Lengths
from orpo_ray.planner.memory import Method, held, trained_numbers
from orpo_ray.planner.network import Workers as Linked
from orpo_ray.planner.shapes import Shape
from orpo_ray.training.layout_choice import LayoutChoice, choose_layout
from orpo_ray.training.plan import PADDED
from orpo_ray.training.strategy import ModelSize, StrategyChoice, Workers, choose_strategy

_SHORTER = 128
"""A shorter `data.max_length` is a multiple of this."""
_HOUR = 3600.0
_LOGIT_BYTES = {"ORPO": 14.0, "CPO": 14.0, "DPO": 29.0, "KTO": 14.0}
"""Bytes that each of TRL's trainers holds for a logit of a micro-batch.

`orpo-ray bench step` measured it in float32 from vocabularies of 8,000 and 32,000 ids, with ORPO
and DPO. CPO computes its logits as ORPO does; KTO is taken to do so, too.
"""
_COMPUTED = ("steps", "evaluation")
"""The parts of a duration that a GPU's speed decides; a run measures no other."""
_UNTRIED_TOKENS = {"cpu": 8192, "cuda": 4096}
"""Tokens of a micro-batch that is not tried before the first step (training/setup.py)."""
_BETWEEN_PROCESSES = "10gbit"
"""What gloo moves between processes of one server is nearest to this."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run may go: so many servers with so many GPUs each, and the network between them."""

    count: int = 1
    nodes: int = 1
    network: Link

    @property
    def workers(self) -> int:
        """One worker for each GPU."""
        return self.count * self.nodes


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One run, or one stage of a run, on one kind of GPU.

    `pairs_per_second` is None if it does not fit, `duration` also if nobody knows how many pairs
    there are.
    """

    name: str
    objective: str
    fit: Fit
    layout: LayoutChoice
    strategy: StrategyChoice
    pairs_per_second: Interval | None
    duration: Duration | None


@dataclass(frozen=True, kw_only=True)
class GpuPlan:
    """A run on one kind of GPU.

    `hours` is None if nobody knows how many pairs there are, or if the run does not fit. `change`
    is the cheapest one with which it fits. `search` is the hours of a whole search, if the config
    has one. `is_unmeasured`: nobody has published the speed of this GPU. `reason` says why figures
    of time are intervals.
    """

    gpu: Gpu
    stages: tuple[StagePlan, ...]
    hours: Interval | None
    search: Interval | None
    cost: Interval | None
    change: str
    reason: str
    is_unmeasured: bool

    @property
    def fits(self) -> bool:
        """Whether every stage fits."""
        return all(stage.fit.tokens is not None for stage in self.stages)

    @property
    def is_memory_uncertain(self) -> bool:
        """Whether an error that the law of memory may have decides if it fits."""
        return any(stage.fit.is_uncertain for stage in self.stages)

    @property
    def is_uncertain(self) -> bool:
        """Whether fitting is in doubt, or nobody has measured the GPU."""
        return self.is_unmeasured or self.is_memory_uncertain

    @property
    def worst(self) -> StagePlan:
        """The stage that takes the most memory."""
        return max(self.stages, key=lambda stage: stage.fit.peak.middle)

    @property
    def pairs_per_second(self) -> Interval | None:
        """Of the stage that trains slowest."""
        speeds = [stage.pairs_per_second for stage in self.stages if stage.pairs_per_second]
        return min(speeds, key=lambda speed: speed.middle, default=None)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What is known of a run before it starts.

    `learnt` has what earlier runs on a device have shown, by its name.
    """

    config: RunConfig
    shape: Shape
    lengths: Lengths
    place: Place
    prices: Prices | None = None
    learnt: Mapping[str, Calibration] = field(default_factory=dict)

    @property
    def configs(self) -> list[RunConfig]:
        """The config of each stage, or that of a run without stages."""
        return stage_configs(self.config) if self.config.stages else [self.config]

    def on(self, gpu: Gpu) -> GpuPlan:
        """The run on one kind of GPU."""
        config = self.config
        stages = tuple(self.stage(stage, gpu) for stage in self.configs)
        fits = all(stage.fit.tokens is not None for stage in stages)
        hours = _hours(stages) if fits else None
        search = None
        if hours is not None and config.search is not None:
            run = [stage.duration for stage in stages if stage.duration is not None]
            search = search_seconds(run, config.search, trial_count(config)).times(1 / _HOUR)
        paid = search or hours
        cost = None
        if self.prices and paid is not None:
            cost = self.prices.of(gpu.name, self.place.workers, paid)
        engine = Engine(self.shape, stages[-1].fit.method)
        reason, is_unmeasured = engine.reason(gpu)
        if known := self.learnt.get(gpu.name):
            reason, is_unmeasured = f"calibrated here by {known.told}", False
        return GpuPlan(
            gpu=gpu,
            stages=stages,
            hours=hours,
            search=search,
            cost=cost,
            change="" if fits else self._change(gpu),
            reason=reason,
            is_unmeasured=is_unmeasured,
        )

    def stage(self, config: RunConfig, gpu: Gpu) -> StagePlan:
        """One run without stages, or one stage."""
        layout, strategy, request = self._request(config, gpu)
        found = _fit(config, request, gpu)
        speed, took = self._time(config, request, found, gpu)
        return StagePlan(
            name=config.name,
            objective=config.objective.kind,
            fit=found,
            layout=layout,
            strategy=strategy,
            pairs_per_second=speed,
            duration=took,
        )

    def _time(
        self, config: RunConfig, request: Request, found: Fit, gpu: Gpu
    ) -> tuple[Interval | None, Duration | None]:
        """Pairs a second while it trains, and how long it takes in all."""
        if found.tokens is None:
            return None, None
        engine = Engine(self.shape, found.method)
        workers = Linked(
            servers=self.place.nodes,
            per_server=self.place.count,
            inside=inside(gpu) if self.place.count > 1 else None,
            network=self.place.network,
        )
        pairs = config.training.pairs_per_step
        steps = Steps(request, engine, gpu, workers, pairs)
        step = steps.step(found.tokens)
        took = duration(config, self.lengths, steps, found.tokens, step)
        if known := self.learnt.get(gpu.name):
            speed = known.of_speed(step.under(pairs))
            return speed, None if took is None else _corrected(took, known)
        return step.under(pairs), took

    def _request(self, config: RunConfig, gpu: Gpu) -> tuple[LayoutChoice, StrategyChoice, Request]:
        objective, training = config.objective, config.training
        layout = self._layout(config)
        on_gpu = gpu.name != CPU
        dtype = _dtype(config, gpu)
        half = dtype != "float32"
        method = Method(
            quantization=config.model.quantization,
            half=half,
            rank=config.adapter.r if config.adapter.kind == "lora" else None,
            targets=config.adapter.targets,
            dora=config.adapter.dora,
            dropout=config.adapter.dropout if config.adapter.kind == "lora" else 0.0,
            on_gpu=on_gpu,
            flash=gpu.bf16 and half,
            layout=layout.layout,
            workers=self.place.workers,
            optimizer=training.optimizer,
            galore=training.galore.rank,
            full_logits=_logit_bytes(config),
        )
        size = ModelSize(
            int(held(self.shape, method)["weights"]), trained_numbers(self.shape, method)
        )
        memory = gpu.memory if on_gpu else None
        workers = Workers(self.place.workers, self.place.nodes, memory)
        strategy = choose_strategy(config, workers, dtype, size)
        request = Request(
            shape=self.shape,
            method=replace(method, stage=strategy.strategy.stage),
            strategy=strategy.strategy,
            lengths=self.lengths.lengths,
            step=0,
            tokens=_unless_auto(training.tokens_per_microbatch),
            checkpointing=_unless_auto(training.gradient_checkpointing),
            with_rejected=objective.needs_rejected,
            scores_prompt=objective.scores_prompt,
        )
        tokens = request.costs.tokens
        # ZeRO-3 divides the weights of a base that is not quantised before a pack could be tried.
        divided = strategy.strategy.shares_weights and config.model.quantization == "none"
        if training.engine == "trl" or divided:
            device = "cuda" if on_gpu else "cpu"
            request = replace(
                request,
                tokens=request.tokens or max(_UNTRIED_TOKENS[device], int(tokens.max())),
                checkpointing=on_gpu if request.checkpointing is None else request.checkpointing,
                untried=True,
            )
        step = math.ceil(float(tokens.mean()) * training.pairs_per_step)
        known = self.learnt.get(gpu.name)
        request = replace(request, step=step, learnt=known.memory if known else 1.0)
        return layout, strategy, request

    def _layout(self, config: RunConfig) -> LayoutChoice:
        if config.training.engine == "trl":
            return LayoutChoice(PADDED, "TRL's trainers pad")
        return choose_layout(
            config.training.layout,
            Traits(),
            self.lengths.lengths,
            with_rejected=config.objective.needs_rejected,
        )

    def _change(self, gpu: Gpu) -> str:
        """The cheapest change with which the run fits, in words."""
        for text, values in changes(self.config):
            try:
                config = with_values(self.config, values)
            except ConfigError:
                continue
            if replace(self, config=config, prices=None)._fits(gpu):
                return text
        if length := self._shorter(gpu):
            return f"data.max_length={length} (longer pairs are dropped)"
        larger = sorted(load_gpus().values(), key=lambda each: each.memory)
        for other in larger:
            if other.memory > gpu.memory and self._fits(other):
                return f"--gpu {other.name}: the smallest known GPU that it fits into"
        return "no single change is enough"

    def _fits(self, gpu: Gpu) -> bool:
        return all(
            _fit(config, self._request(config, gpu)[2], gpu).tokens is not None
            for config in self.configs
        )

    def _shorter(self, gpu: Gpu) -> int | None:
        """The longest `data.max_length` with which the run fits, or None."""
        sides = self.lengths.lengths[:, 0] + self.lengths.lengths[:, 1:].max(axis=1)
        for length in range(self.config.data.max_length - _SHORTER, 0, -_SHORTER):
            left = self.lengths.lengths[sides <= length]
            if not len(left):
                return None
            if self.lengths.is_assumed:  # the longest pair that the run would allow
                prompt = length // 2
                left = np.vstack([left, [prompt, length - prompt, length - prompt]])
            if replace(self, lengths=replace(self.lengths, lengths=left))._fits(gpu):
                return length
        return None


def _corrected(planned: Duration, known: Calibration) -> Duration:
    """How long a run takes after what earlier runs on the device have shown."""
    parts = {
        name: known.of_time(part) if name in _COMPUTED else part
        for name, part in planned.parts.items()
    }
    return replace(planned, seconds=Interval.total(parts.values()), parts=parts)


def _unless_auto(value: Any) -> Any:
    return None if value == "auto" else value


def _logit_bytes(config: RunConfig) -> float:
    """Bytes for each logit of a micro-batch, 0 with our own engine."""
    in_trl = config.objective.in_trl()
    if config.training.engine != "trl" or isinstance(in_trl, str):
        return 0.0
    return _LOGIT_BYTES[in_trl.trainer]


def _dtype(config: RunConfig, gpu: Gpu) -> str:
    if config.model.dtype != "auto":
        return config.model.dtype
    if gpu.name == CPU:
        return "float32"
    return "bfloat16" if gpu.bf16 else "float16"


def _fit(config: RunConfig, request: Request, gpu: Gpu) -> Fit:
    """How a run fits: not at all if it asks for bfloat16 and the GPU has none."""
    limit = config.training.memory_limit
    found = fit(request, gpu if limit is None else with_limit(gpu, limit))
    refused = config.model.dtype == "bfloat16" and gpu.name != CPU and not gpu.bf16
    return replace(found, tokens=None) if refused else found


def with_limit(gpu: Gpu, limit: float) -> Gpu:
    """A GPU of which a worker uses so many GB at most."""
    return replace(gpu, memory=min(gpu.memory, int(limit * 1e9)))


def inside(gpu: Gpu) -> Link:
    """What joins the workers of one server."""
    return find_network(_BETWEEN_PROCESSES) if gpu.name == CPU else find_server_link(gpu.link)


def _hours(stages: Sequence[StagePlan]) -> Interval | None:
    found = [stage.duration.seconds for stage in stages if stage.duration is not None]
    return Interval.total(found).times(1 / _HOUR) if len(found) == len(stages) else None
