"""How workers share a model: the choice that `scale.deepspeed: auto` makes, and its reason."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from orpo_ray.config import RunConfig
from orpo_ray.config.optimizers import OPTIMIZERS
from orpo_ray.config.training import DeepSpeedConfig


class Strategy(StrEnum):
    """How workers share a model.

    `stage` is the stage of DeepSpeed's ZeRO, None without DeepSpeed.
    """

    stage: int | None

    SINGLE = "single-process", None
    DDP = "ddp", None
    ZERO_0 = "deepspeed-zero-0", 0
    ZERO_1 = "deepspeed-zero-1", 1
    ZERO_2 = "deepspeed-zero-2", 2
    ZERO_3 = "deepspeed-zero-3", 3

    def __new__(cls, name: str, stage: int | None = None) -> Self:
        """The value of a member is the name that a run's files and results have."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.stage = stage
        return member

    @classmethod
    def zero(cls, stage: int) -> "Strategy":
        """The strategy with that stage of DeepSpeed."""
        return next(strategy for strategy in cls if strategy.stage == stage)

    @property
    def shares_weights(self) -> bool:
        """Whether each worker holds only a part of the weights."""
        return self.stage == 3


# Bytes for each trained parameter: float32 weight, gradient, and the two moments of AdamW.
_WEIGHT, _GRADIENT, _MOMENTS = 4, 4, 8
_MEMORY_FOR_STATE = 0.7
"""The share of a worker's memory for weights and optimizer state; activations take the rest."""


@dataclass(frozen=True)
class Workers:
    """The processes of a run.

    `memory` is the GPU memory of each in bytes, None if they compute on CPUs.
    """

    count: int
    nodes: int
    memory: int | None


@dataclass(frozen=True)
class ModelSize:
    """The bytes of the frozen weights on one worker, and the number of trained parameters.

    `state` is the bytes of optimizer state for each of them.
    """

    frozen_bytes: int
    trained: int
    state: float = _MOMENTS


@dataclass(frozen=True)
class StrategyChoice:
    """How the workers share the model, and why."""

    strategy: Strategy
    reason: str


def choose_strategy(
    config: RunConfig, workers: Workers, dtype: str, size: ModelSize
) -> StrategyChoice:
    """Decide how `workers` train a model of that size.

    Pure; `dtype` is the one that the run computes in.
    """
    asked = config.scale.deepspeed
    if isinstance(asked, DeepSpeedConfig):
        return StrategyChoice(Strategy.zero(asked.stage), "as configured")
    if workers.count == 1:
        return StrategyChoice(Strategy.SINGLE, "one worker has nothing to share")
    if asked == "none":
        return StrategyChoice(Strategy.DDP, "as configured")
    optimizer = config.training.optimizer
    if unsharded := OPTIMIZERS[optimizer].unsharded:
        return StrategyChoice(Strategy.DDP, f"{optimizer} {unsharded}, which ZeRO cannot split")
    if dtype == "float16":
        return StrategyChoice(
            Strategy.DDP,
            "float16 needs a loss scale, which is tested without DeepSpeed only",
        )
    room = None if workers.memory is None else _MEMORY_FOR_STATE * workers.memory
    if config.adapter.kind != "none":
        return _for_adapter(config, workers, size, room)
    return _for_full_training(workers, size, room)


def _for_adapter(
    config: RunConfig, workers: Workers, size: ModelSize, room: float | None
) -> StrategyChoice:
    """The base is frozen, so the workers have little to share, unless the base does not fit."""
    base = "the base fits on each worker"
    if room is not None and size.frozen_bytes > room:
        base = (
            f"the base takes {_size(size.frozen_bytes)}, more than the {_size(room)} that a "
            "worker has for it"
        )
        if config.model.quantization == "none":
            return StrategyChoice(Strategy.ZERO_3, base)
        base += (
            ", and each worker loads the whole of a quantised base in every ZeRO stage; trying it "
            "anyway"
        )
    if workers.nodes == 1:
        return StrategyChoice(
            Strategy.ZERO_2, f"{base}; the workers share optimizer state and gradients"
        )
    crossing = _size(_GRADIENT * size.trained)
    return StrategyChoice(
        Strategy.DDP,
        f"{base}; up to {crossing} of gradients cross the network once a step, not once a pack",
    )


def _for_full_training(workers: Workers, size: ModelSize, room: float | None) -> StrategyChoice:
    """The lowest stage that fits: a higher stage needs more traffic."""
    takes = {stage: bytes_of_stage(size, workers.count, stage) for stage in range(4)}
    fitting = [stage for stage, needed in takes.items() if room is None or needed <= room]
    stage = fitting[0] if fitting else 3
    reason = f"weights, gradients and optimizer state take {_size(takes[stage])} on each worker"
    if room is not None:
        limit = f"the {_size(room)} that it has for them"
        reason += f", within {limit}" if fitting else f", more than {limit}; trying it anyway"
    return StrategyChoice(Strategy.zero(stage) if stage else Strategy.DDP, reason)


def bytes_of_stage(size: ModelSize, workers: int, stage: int) -> float:
    """Bytes of weights, gradients and optimizer state on each worker with a ZeRO stage.

    In stage 0 each worker holds everything.
    """
    state = size.state / (workers if stage >= 1 else 1)
    gradient = _GRADIENT / (workers if stage >= 2 else 1)
    holders = workers if stage >= 3 else 1
    weight, frozen = _WEIGHT / holders, size.frozen_bytes / holders
    return frozen + size.trained * (weight + gradient + state)


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
