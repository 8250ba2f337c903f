"""Which pairs form each optimizer step, and how a step is cut into packs: a pure function of lengths and seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Pack:
    """Pairs that one rank runs in one forward pass. Weight 0 keeps a rank without work in step with the others."""

    pairs: Indices
    weight: float = 1.0


@dataclass(frozen=True)
class Step:
    """One optimizer step: its pairs, and for each rank its packs, the same number on every rank."""

    pairs: Indices
    packs: tuple[tuple[Pack, ...], ...]


def plan(
    lengths: NDArray[np.int64], pairs_per_step: int, world_size: int, token_budget: int, seed: int, epoch: int
) -> list[Step]:
    """The steps of an epoch. Which pairs a step holds depends on neither world size nor token budget.

    `lengths` [n] are the tokens of each pair's longer side; a padded pack of k pairs costs 2 * k * its longest.
    A pair that exceeds the budget alone still gets a pack of its own.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths)).astype(np.int64)
    steps = [order[start : start + pairs_per_step] for start in range(0, len(order), pairs_per_step)]
    return [Step(pairs, deal(cut_packs(pairs, lengths, token_budget), lengths, world_size)) for pairs in steps]


def pack_cost(pairs: Indices, lengths: NDArray[np.int64]) -> int:
    """Tokens that a padded pack occupies, padding included."""
    return int(2 * len(pairs) * lengths[pairs].max())


def cut_packs(pairs: Indices, lengths: NDArray[np.int64], token_budget: int) -> list[Indices]:
    """Packs of neighbours in length, each within the budget."""
    descending = pairs[np.argsort(-lengths[pairs], kind="stable")]
    packs: list[Indices] = []
    start = 0
    while start < len(descending):
        fitting = max(1, token_budget // int(2 * lengths[descending[start]]))
        packs.append(descending[start : start + fitting])
        start += fitting
    return packs


def deal(packs: list[Indices], lengths: NDArray[np.int64], world_size: int) -> tuple[tuple[Pack, ...], ...]:
    """Packs to ranks, balanced by cost, the same number for each, of weight 0 where a rank has none."""
    packs = _split_to_multiple(packs, lengths, world_size)
    per_rank = -(-len(packs) // world_size)
    ranks: list[list[Pack]] = [[] for _ in range(world_size)]
    cost = [0] * world_size
    for pack in sorted(packs, key=lambda pairs: -pack_cost(pairs, lengths)):
        open_ranks = [rank for rank in range(world_size) if len(ranks[rank]) < per_rank]
        rank = min(open_ranks, key=lambda r: cost[r])
        ranks[rank].append(Pack(pack))
        cost[rank] += pack_cost(pack, lengths)
    idle = Pack(packs[-1][-1:], weight=0.0)
    return tuple(tuple(own + [idle] * (per_rank - len(own))) for own in ranks)


def _split_to_multiple(packs: list[Indices], lengths: NDArray[np.int64], world_size: int) -> list[Indices]:
    """Halve the costliest packs until every rank gets as many as the others, or no pack has two pairs left."""
    packs = list(packs)
    while len(packs) % world_size:
        splittable: Sequence[int] = [i for i, pack in enumerate(packs) if len(pack) > 1]
        if not splittable:
            break
        costliest = packs.pop(max(splittable, key=lambda i: pack_cost(packs[i], lengths)))
        middle = len(costliest) // 2
        packs += [costliest[:middle], costliest[middle:]]
    return packs
