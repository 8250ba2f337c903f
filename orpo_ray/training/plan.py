"""Which pairs form each optimizer step, and how a step is cut into packs.

Pure functions of the pairs' lengths and the seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class Layout(StrEnum):
    """How the pairs of a micro-batch are put into rows (see `layout.py`)."""

    PADDED = "padded"
    PACKED = "packed"
    SHARED_PREFIX = "shared-prefix"

    @property
    def pads(self) -> bool:
        """Whether each side is a padded row of its own; else all are in a single row."""
        return self is Layout.PADDED

    @property
    def shares_prompts(self) -> bool:
        """Whether both answers of a pair follow one prompt."""
        return self is Layout.SHARED_PREFIX


PADDED, PACKED, SHARED_PREFIX = Layout


@dataclass(frozen=True)
class PackCosts:
    """Tokens that pairs take.

    `tokens` [n] are those of each pair alone. In a `rectangular` pack every pair takes as many as
    the longest one.
    """

    tokens: Indices
    rectangular: bool

    def of(self, pairs: Indices) -> int:
        """Tokens that a pack of these pairs takes, padding included."""
        tokens = self.tokens[pairs]
        return int(len(pairs) * tokens.max()) if self.rectangular else int(tokens.sum())


def longer_side(lengths: Indices) -> Indices:
    """Tokens of each pair's longer side, [n], from (prompt, chosen, rejected) lengths [n, 3]."""
    longer: Indices = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    return longer


def pack_costs(lengths: Indices, layout: Layout, *, with_rejected: bool = True) -> PackCosts:
    """What pairs of (prompt, chosen, rejected) lengths [n, 3] cost in a layout."""
    prompt, chosen, rejected = lengths.T
    if not with_rejected:
        return PackCosts(prompt + chosen, rectangular=layout.pads)
    if layout.pads:
        return PackCosts(2 * longer_side(lengths), rectangular=True)
    prompts = prompt if layout.shares_prompts else 2 * prompt
    return PackCosts(prompts + chosen + rejected, rectangular=False)


@dataclass(frozen=True)
class Pack:
    """Pairs that one rank runs in one forward pass.

    A rank that has no pair left runs a pack of weight 0, because all ranks must run equally many.
    """

    pairs: Indices
    weight: float = 1.0


@dataclass(frozen=True)
class Step:
    """One optimizer step: its pairs, and the packs of each rank, equally many for all."""

    pairs: Indices
    packs: tuple[tuple[Pack, ...], ...]


def step_pairs(count: int, pairs_per_step: int, seed: int, epoch: int) -> list[Indices]:
    """The pairs of each optimizer step of an epoch over `count` pairs.

    The last step may have fewer.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count).astype(np.int64)
    return [order[start : start + pairs_per_step] for start in range(0, count, pairs_per_step)]


def cut_step(pairs: Indices, costs: PackCosts, world_size: int, token_budget: int) -> Step:
    """One step's pairs as packs for each rank.

    A pair that is larger than the budget gets a pack of its own.
    """
    return Step(pairs, deal(cut_packs(pairs, costs, token_budget), costs, world_size))


def cut_packs(pairs: Indices, costs: PackCosts, token_budget: int) -> list[Indices]:
    """Packs within the budget.

    Padded packs take pairs of similar length. Other packs are filled by first-fit-decreasing.
    """
    descending = pairs[np.argsort(-costs.tokens[pairs], kind="stable")]
    if costs.rectangular:
        return _neighbours(descending, costs.tokens, token_budget)
    room = np.zeros(len(descending), dtype=np.int64)
    packs: list[list[int]] = []
    for pair in descending:
        tokens = costs.tokens[pair]
        fitting = np.flatnonzero(room[: len(packs)] >= tokens)
        if len(fitting):
            number = int(fitting[0])
            packs[number].append(pair)
        else:
            number = len(packs)
            packs.append([pair])
            room[number] = token_budget
        room[number] -= tokens
    return [np.array(pack, dtype=np.int64) for pack in packs]


def _neighbours(descending: Indices, tokens: Indices, token_budget: int) -> list[Indices]:
    packs: list[Indices] = []
    start = 0
    while start < len(descending):
        fitting = max(1, token_budget // int(tokens[descending[start]]))
        packs.append(descending[start : start + fitting])
        start += fitting
    return packs


def deal(packs: list[Indices], costs: PackCosts, world_size: int) -> tuple[tuple[Pack, ...], ...]:
    """Deal packs to ranks, balanced by cost and equally many for all.

    A rank with too few packs gets packs of weight 0.
    """
    packs = _split_to_multiple(packs, costs, world_size)
    per_rank = -(-len(packs) // world_size)
    ranks: list[list[Pack]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for pack in sorted(packs, key=lambda pairs: -costs.of(pairs)):
        open_ranks = [rank for rank in range(world_size) if len(ranks[rank]) < per_rank]
        rank = min(open_ranks, key=lambda r: load[r])
        ranks[rank].append(Pack(pack))
        load[rank] += costs.of(pack)
    idle = Pack(packs[-1][-1:], weight=0.0)
    return tuple(tuple(own + [idle] * (per_rank - len(own))) for own in ranks)


def _split_to_multiple(packs: list[Indices], costs: PackCosts, world_size: int) -> list[Indices]:
    """Halve the most expensive packs until all ranks get equally many.

    It stops earlier if each pack has only one pair.
    """
    packs = list(packs)
    while len(packs) % world_size:
        splittable: Sequence[int] = [i for i, pack in enumerate(packs) if len(pack) > 1]
        if not splittable:
            break
        costliest = packs.pop(max(splittable, key=lambda i: costs.of(packs[i])))
        if costs.rectangular:
            packs += _halves(costliest)
        else:
            packs += [costliest[::2], costliest[1::2]]  # both halves get long and short pairs
    return packs


def _halves(pack: Indices) -> list[Indices]:
    middle = len(pack) // 2
    return [pack[:middle], pack[middle:]]
