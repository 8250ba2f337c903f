"""Which processed rows become training and evaluation pairs: duplicates, the held-out share,
weights.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from orpo_ray.config.data import Source


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Row numbers of the processed table, in order; a number stands in `train` as often as its
    weight says.
    """

    train: list[int]
    eval: list[int]
    kept: list[int]
    duplicates: list[int]
    overlap: int


def select_pairs(
    rows: pa.Table, train: Sequence[Source], hold_out: float | None, seed: int
) -> Selection:
    """Choose from processed rows, whose sources below `len(train)` are for training and the others
    for evaluation.

    `hold_out` is the share of the training pairs to evaluate on when there is no evaluation source.
    """
    sources, codes = rows["source"].to_pylist(), rows["code"].to_pylist()
    keys = rows["pair_key"].to_pylist()
    usable = [index for index, code in enumerate(codes) if not code]
    first_train, more_train = _first_of_each([i for i in usable if sources[i] < len(train)], keys)
    evaluation, more_eval = _first_of_each([i for i in usable if sources[i] >= len(train)], keys)
    if hold_out is not None:
        held_out = _hold_out(first_train, rows["prompt_key"].to_pylist(), hold_out, seed)
        evaluation = [index for index in first_train if index in held_out]
        first_train = [index for index in first_train if index not in held_out]
    in_train = {keys[index] for index in first_train}
    return Selection(
        train=_weighted(first_train, sources, train, rows["pair_id"].to_pylist(), seed),
        eval=evaluation,
        kept=[*first_train, *evaluation],
        duplicates=[*more_train, *more_eval],
        overlap=sum(keys[index] in in_train for index in evaluation),
    )


def _first_of_each(indices: Sequence[int], keys: Sequence[bytes]) -> tuple[list[int], list[int]]:
    seen: set[bytes] = set()
    first: list[int] = []
    more: list[int] = []
    for index in indices:
        (more if keys[index] in seen else first).append(index)
        seen.add(keys[index])
    return first, more


def _hold_out(
    indices: Sequence[int], prompts: Sequence[bytes], share: float, seed: int
) -> set[int]:
    """Whole prompts in a seeded order until the share is reached; none where all pairs have one
    prompt.
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index in indices:
        groups[prompts[index]].append(index)
    if len(groups) < 2:
        return set()
    wanted = max(1, round(share * len(indices)))
    order = sorted(groups, key=lambda prompt: _rank(seed, prompt))
    held_out: set[int] = set()
    for prompt in order:
        if len(held_out) + len(groups[prompt]) <= wanted:
            held_out.update(groups[prompt])
    return held_out or set(groups[min(order, key=lambda prompt: len(groups[prompt]))])


def _weighted(
    indices: Sequence[int],
    sources: Sequence[int],
    train: Sequence[Source],
    pair_ids: Sequence[str],
    seed: int,
) -> list[int]:
    """Each index as often as the whole part of its weight, and a seeded choice of them once
    more.
    """
    extra: set[int] = set()
    for number, source in enumerate(train):
        own = [index for index in indices if sources[index] == number]
        order = sorted(own, key=lambda index: _rank(seed, pair_ids[index].encode()))
        extra.update(order[: round(source.weight % 1 * len(own))])
    return [i for i in indices for _ in range(int(train[sources[i]].weight) + (i in extra))]


def _rank(seed: int, key: bytes) -> bytes:
    return hashlib.sha256(f"{seed}:".encode() + key).digest()
