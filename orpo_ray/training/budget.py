"""How many tokens a micro-batch may have, and whether activations are kept.

Two small packs show how memory grows with tokens. Then the largest pack of the plan is tried before
the first step. So memory runs out in the first minute or never. These decisions change no result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from orpo_ray.training.plan import Indices, PackCosts
from orpo_ray.training.strategy import ModelSize, Strategy, bytes_of_stage

Measure = Callable[[int, bool], int | None]
"""Takes a number of tokens, and whether activations are recomputed (gradient checkpointing).

Returns the most bytes that such a pack takes, forward and backward, or None if memory runs out.
"""

MOST_TOKENS = 8192
"""The largest micro-batch of `auto`, unless one pair is larger.

Larger ones gain nothing on a CPU. On a GPU they are not measured: a config may ask for them.
"""
_ENOUGH_TOKENS = 4096
"""A micro-batch of this size keeps a GPU busy.

A larger one is not worth recomputing activations for: that costs more time than it saves.
"""
_SMALLER = 0.75
"""What a size that did not fit is multiplied by."""
_USABLE = 0.9
"""The share of the free memory that is used: there are gaps between blocks."""


class Memory(Protocol):
    """The memory of one process's device."""

    def free(self) -> int:
        """Bytes that tensors may still take."""

    def peak_of(self, run: Callable[[], object]) -> int | None:
        """The most bytes that `run` takes, besides those before it; None if memory runs out."""


@dataclass(frozen=True)
class Budget:
    """The most tokens of a micro-batch, and whether the backward pass recomputes activations."""

    tokens: int
    checkpointing: bool


@dataclass(frozen=True)
class Sizes:
    """Sizes of packs, in tokens."""

    longest: int
    """A pack of the longest pair alone."""
    another: int
    """A pack with more pairs, to measure how memory grows."""
    step: int
    """A pack of a whole step."""
    most: int
    """No micro-batch may be larger."""


def find_budget(
    measure: Measure, room: int, sizes: Sizes, checkpointing: bool | None
) -> Budget | None:
    """The budget for a process with `room` bytes, or None if the longest pair does not fit.

    If `checkpointing` is None, activations are kept if enough tokens fit with them.
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
    if growth <= 0:
        return sizes.most
    return min(sizes.most, sizes.longest + int((room - first) / growth))


def with_set_tokens(found: Budget, largest: int, asked: bool | None) -> bool:
    """Whether activations are recomputed if the user has set the tokens of a micro-batch.

    `found` is what fits, and `largest` the largest pack that comes. Activations that fit for fewer
    tokens only are not kept, unless `asked` says so.
    """
    return (
        found.checkpointing
        if asked is not None
        else (found.checkpointing or found.tokens < largest)
    )


def smaller(tokens: int, longest: int) -> int | None:
    """The size to try after a pack of `tokens` did not fit.

    None if that pack held the longest pair alone: there is no smaller one.
    """
    return None if tokens <= longest else max(longest, int(_SMALLER * tokens))


def usable(free: int, trained: ModelSize, workers: int, strategy: Strategy) -> int:
    """Bytes that packs may take, of the `free` ones.

    The trained float32 parameters have no gradient and no optimizer state yet. Their memory is left
    free. How much of it a worker holds depends on the strategy. DDP also has a copy of the
    gradients, to exchange them.
    """
    weights = gradients = 4 * trained.trained
    reserved = bytes_of_stage(trained, workers, strategy.stage or 0) - weights
    if strategy is Strategy.DDP:
        reserved += gradients
    return int(_USABLE * free - max(0.0, reserved))


def sample_pack(costs: PackCosts, tokens: int) -> Indices:
    """The longest pairs, as many as fit into `tokens`.

    No other pack of that size takes more memory.
    """
    order = np.argsort(-costs.tokens, kind="stable")
    count = 1
    while count < len(order) and costs.of(order[: count + 1]) <= tokens:
        count += 1
    return order[:count].astype(np.int64)
