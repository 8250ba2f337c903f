"""Which pairs form each optimizer step, and how a step is cut into packs: a pure function of
lengths and seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class Layout(StrEnum):
    """How the pairs of a micro-batch stand in rows (see `layout.py`)."""

    PADDED = "padded"
    PACKED = "packed"
    SHARED_PREFIX = "shared-prefix"

    @property
    def pads(self) -> bool:
        """Whether each side is a row of its own, filled up; else all stand in a single row."""
        return self is Layout.PADDED

    @property
    def shares_prompts(self) -> bool:
        """Whether both answers of a pair go on from one prompt."""
        return self is Layout.SHARED_PREFIX


PADDED, PACKED, SHARED_PREFIX = Layout


@dataclass(frozen=True)
class PackCosts:
    """Tokens that pairs take: `tokens` [n] of each alone; in a `rectangular` pack all take as many
    as the longest.
    """

    tokens: Indices
    rectangular: bool

    def of(self, pairs: Indices) -> int:
        """Tokens that a pack of these pairs occupies, padding included."""
        tokens = self.tokens[pairs]
        return int(len(pairs) * tokens.max() if self.rectangular else tokens.sum())


def longer_side(lengths: Indices) -> Indices:
    """Tokens of a pair's longer row, [n], from its (prompt, chosen, rejected) lengths [n, 3]."""
    longer: Indices = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    return longer


def pack_costs(lengths: Indices, layout: Layout, *, with_rejected: bool = True) -> PackCosts:
    """What pairs of (prompt, chosen, rejected) lengths [n, 3] cost in a layout."""
    prompt, chosen, rejected = lengths.T
    if not with_rejected:
        return PackCosts(prompt + chosen, rectangular=layout.pads)
    if layout.pads:
        return PackCosts(2 * longer_side(lengths), rectangular=True)
    return PackCosts(
        (1 if layout.shares_prompts else 2) * prompt + chosen + rejected, rectangular=False
    )


@dataclass(frozen=True)
class Pack:
    """Pairs that one rank runs in one forward pass.

    Weight 0 keeps a rank without work in step with the others.
    """

    pairs: Indices
    weight: float = 1.0


@dataclass(frozen=True)
class Step:
    """One optimizer step: its pairs, and for each rank its packs, the same number on every rank."""

    pairs: Indices
    packs: tuple[tuple[Pack, ...], ...]


def step_pairs(count: int, pairs_per_step: int, seed: int, epoch: int) -> list[Indices]:
    """The pairs of each optimizer step of an epoch over `count` pairs; the last step may have
    fewer.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count).astype(np.int64)
    return [order[start : start + pairs_per_step] for start in range(0, count, pairs_per_step)]


def cut_step(pairs: Indices, costs: PackCosts, world_size: int, token_budget: int) -> Step:
    """One step's pairs as packs for each rank; a pair that exceeds the budget alone still gets a
    pack of its own.
    """
    return Step(pairs, deal(cut_packs(pairs, costs, token_budget), costs, world_size))


def cut_packs(pairs: Indices, costs: PackCosts, token_budget: int) -> list[Indices]:
    """Packs within the budget: neighbours in length where they are padded, else
    first-fit-decreasing.
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
    """Packs to ranks, balanced by cost, the same number for each, of weight 0 where a rank has
    none.
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
    """Halve the costliest packs until every rank gets as many as the others, or no pack has two
    pairs left.
    """
    packs = list(packs)
    while len(packs) % world_size:
        splittable: Sequence[int] = [i for i, pack in enumerate(packs) if len(pack) > 1]
        if not splittable:
            break
        costliest = packs.pop(max(splittable, key=lambda i: costs.of(packs[i])))
        # Every second pair: both halves hold long and short ones.
        packs += [costliest[::2], costliest[1::2]] if not costs.rectangular else _halves(costliest)
    return packs


def _halves(pack: Indices) -> list[Indices]:
    middle = len(pack) // 2
    return [pack[:middle], pack[middle:]]
