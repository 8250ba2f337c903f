"""How many tokens a micro-batch may have, and whether activations are kept: found from the memory
that is there.

Two small packs tell how memory grows with tokens; then the largest pack of the plan is tried,
before the first step, so that memory runs out in the first minute or never. What is decided here
changes no result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from orpo_ray.training.plan import Indices, PackCosts
from orpo_ray.training.strategy import ModelSize, Strategy, bytes_of_stage

Measure = Callable[[int, bool], int | None]
"""Bytes that a pack of so many tokens takes at once, forward and backward, with or without gradient
checkpointing;
None where there are not as many."""

_ENOUGH_TOKENS = 4096
"""A micro-batch of this size keeps a GPU busy; beyond it, recomputing activations costs more than
larger ones gain.
"""
_SMALLER = 0.75
_USABLE = 0.9
"""Share of the free memory that is planned with: blocks do not fit together without gaps."""


class Memory(Protocol):
    """The memory of one process's device."""

    def free(self) -> int:
        """Bytes that tensors may still take."""

    def peak_of(self, run: Callable[[], object]) -> int | None:
        """Bytes that were taken at once during `run`, above what was taken before; None where it
        ran out of them.
        """


@dataclass(frozen=True)
class Budget:
    """Tokens of a micro-batch at most, and whether its activations are recomputed in the backward
    pass.
    """

    tokens: int
    checkpointing: bool


@dataclass(frozen=True)
class Sizes:
    """Tokens of packs: of the longest pair alone, of another one with more pairs, of a whole step,
    and the limit.
    """

    longest: int
    another: int
    step: int
    most: int


def find_budget(
    measure: Measure, room: int, sizes: Sizes, checkpointing: bool | None
) -> Budget | None:
    """The budget for a process with `room` bytes, or None where not even the longest pair fits.

    `checkpointing` None: activations are kept where enough tokens fit with them.
    """
    enough = max(sizes.longest, min(sizes.step, sizes.most, _ENOUGH_TOKENS))
    if not checkpointing:
        tokens = _find_tokens(lambda size: measure(size, False), room, sizes)
        if checkpointing is False or (tokens or 0) >= enough:
            return None if tokens is None else Budget(tokens, False)
    tokens = _find_tokens(lambda size: measure(size, True), room, sizes)
    return None if tokens is None else Budget(tokens, True)


def _find_tokens(measure: Callable[[int], int | None], room: int, sizes: Sizes) -> int | None:
    first = measure(sizes.longest)
    if first is None or first > room:
        return None
    if sizes.most <= sizes.longest or sizes.another <= sizes.longest:
        return sizes.longest
    second = measure(sizes.another)
    if second is None or second > room:
        return sizes.longest
    growth = (second - first) / (sizes.another - sizes.longest)
    return (
        sizes.most if growth <= 0 else min(sizes.most, sizes.longest + int((room - first) / growth))
    )


def smaller(tokens: int, longest: int) -> int | None:
    """What to try after a pack of `tokens` did not fit; None where the longest pair alone is what
    did not.
    """
    return None if tokens <= longest else max(longest, int(_SMALLER * tokens))


def usable(free: int, trained: int, workers: int, strategy: Strategy) -> int:
    """Bytes for packs where so many are free and `trained` float32 parameters have no gradient or
    optimizer state yet.

    What of these a worker is to hold is the strategy's; DDP exchanges gradients through a copy of
    them. They are there from a step's second pack on, so that the pack that is tried, which makes
    its own, does not stand for them.
    """
    weights = gradients = 4 * trained
    state = bytes_of_stage(ModelSize(0, trained), workers, strategy.stage or 0) - weights
    return int(_USABLE * free - max(0.0, state + (gradients if strategy is Strategy.DDP else 0)))


def sample_pack(costs: PackCosts, tokens: int) -> Indices:
    """The longest pairs, as many as `tokens` hold: the pack of that size that takes the most
    memory.
    """
    order = np.argsort(-costs.tokens, kind="stable")
    count = 1
    while count < len(order) and costs.of(order[: count + 1]) <= tokens:
        count += 1
    return order[:count].astype(np.int64)
