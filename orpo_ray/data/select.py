"""Which processed rows become training pairs, and which are held out for evaluation."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from orpo_ray.config.data import Source


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Row numbers of the processed table, in order.

    `train` repeats each number by the weight of its source. `kept` has each number once.
    `overlap` counts the pairs that are in both `train` and `eval`.
    """

    train: list[int]
    eval: list[int]
    kept: list[int]
    duplicates: list[int]
    overlap: int


def select_pairs(
    rows: pa.Table, train: Sequence[Source], hold_out: float | None, seed: int
) -> Selection:
    """Choose training and evaluation pairs from processed rows.

    Sources with a number below `len(train)` are for training, the others for evaluation.
    `hold_out` is the share of the training pairs that is held out, None if `data.eval` has sources.
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
        if keys[index] in seen:
            more.append(index)
        else:
            first.append(index)
            seen.add(keys[index])
    return first, more


def _hold_out(
    indices: Sequence[int], prompts: Sequence[bytes], share: float, seed: int
) -> set[int]:
    """Hold out whole prompts, in an order that the seed gives, until the share is reached.

    All pairs of one prompt stay together. If all pairs have the same prompt, none is held out.
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
    if held_out:
        return held_out
    # Each prompt has more pairs than are wanted, so the one with the fewest is held out.
    return set(groups[min(order, key=lambda prompt: len(groups[prompt]))])


def _weighted(
    indices: Sequence[int],
    sources: Sequence[int],
    train: Sequence[Source],
    pair_ids: Sequence[str],
    seed: int,
) -> list[int]:
    """Repeat each index as often as the weight of its source says.

    With a weight of 2.5, every pair comes twice, and half of the pairs come a third time. The seed
    chooses that half.
    """
    extra: set[int] = set()
    for number, source in enumerate(train):
        own = [index for index in indices if sources[index] == number]
        order = sorted(own, key=lambda index: _rank(seed, pair_ids[index].encode()))
        extra.update(order[: round(source.weight % 1 * len(own))])
    repeated: list[int] = []
    for index in indices:
        times = int(train[sources[index]].weight) + (index in extra)
        repeated += [index] * times
    return repeated


def _rank(seed: int, key: bytes) -> bytes:
    return hashlib.sha256(f"{seed}:".encode() + key).digest()
