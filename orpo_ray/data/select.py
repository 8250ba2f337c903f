"""Which processed rows become training pairs, and which are held out for evaluation."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orpo_ray.config.data import Source
from orpo_ray.data.store import SIDES

Rows = npt.NDArray[np.int64]
"""Row numbers of the processed table, in order."""
AreNear = Callable[[Rows, Rows], npt.NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """What becomes of the good rows.

    `train` repeats each number by the weight of its source. `kept` has each number once. `near` are
    the training pairs that are nearly equal to an evaluation pair; if they are dropped, those that
    are quite equal are among them. `overlap` counts the pairs that are in both `train` and `eval`.
    """

    train: Rows
    eval: Rows
    kept: Rows
    duplicates: Rows
    near: Rows
    overlap: int


def none_near(train: Rows, _evaluation: Rows) -> npt.NDArray[np.bool_]:
    """Says of no training row that it is near an evaluation row."""
    return np.zeros(len(train), dtype=bool)


def select_pairs(
    rows: pa.Table,
    train: Sequence[Source],
    hold_out: float | None,
    seed: int,
    *,
    are_near: AreNear = none_near,
    drop_near: bool = False,
) -> Selection:
    """Choose training and evaluation pairs from processed rows.

    Sources with a number below `len(train)` are for training, the others for evaluation.
    `hold_out` is the share of the training pairs that is held out, None if `data.eval` has sources.
    `are_near` says which training rows are near an evaluation row. With `drop_near` these are not
    trained on, nor those that are equal to one.
    """
    sources = rows["source"].to_numpy()
    pairs, _ = _numbered(rows["pair_key"])
    usable = np.flatnonzero(rows["code"].to_numpy() == "")
    is_train = sources[usable] < len(train)
    first_train, more_train = _first_of_each(usable[is_train], pairs)
    evaluation, more_eval = _first_of_each(usable[~is_train], pairs)
    if hold_out is not None:
        prompts, of_prompts = _numbered(rows["prompt_key"].take(pa.array(first_train)))
        has = np.stack([rows[side].to_numpy()[first_train] > 0 for side in SIDES[1:]])
        is_held_out = _hold_out(prompts, of_prompts, has, hold_out, seed)
        evaluation, first_train = first_train[is_held_out], first_train[~is_held_out]
    is_equal = np.isin(pairs[first_train], pairs[evaluation])
    is_near = are_near(first_train, evaluation) & ~is_equal
    near, overlap = first_train[is_near], int(is_equal.sum())
    if drop_near:
        near, first_train = first_train[is_near | is_equal], first_train[~(is_near | is_equal)]
        overlap = 0
    return Selection(
        train=_weighted(first_train, sources, train, rows["pair_id"], seed),
        eval=evaluation,
        kept=np.concatenate([first_train, evaluation]),
        duplicates=np.concatenate([more_train, more_eval]),
        near=near,
        overlap=overlap,
    )


def _numbered(keys: pa.ChunkedArray) -> tuple[Rows, pa.Array]:
    """A number for each key, and the keys by number; a row without a key has -1."""
    coded = keys.combine_chunks().dictionary_encode()
    numbers = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return numbers.astype(np.int64), coded.dictionary


def _first_of_each(indices: Rows, keys: Rows) -> tuple[Rows, Rows]:
    _, places = np.unique(keys[indices], return_index=True)
    is_first = np.zeros(len(indices), dtype=bool)
    is_first[places] = True
    return indices[is_first], indices[~is_first]


def _hold_out(
    numbers: Rows, keys: pa.Array, has: npt.NDArray[np.bool_], share: float, seed: int
) -> npt.NDArray[np.bool_]:
    """Which rows are held out: whole prompts, in an order that the seed gives, up to the share.

    `numbers` has the prompt of each row, and `has` whether it has a better and a worse answer, [2,
    n]. All pairs of one prompt stay together. If all pairs have the same prompt, none is held out.
    If there are better and worse answers, both kinds are held out.
    """
    pairs_of = np.bincount(numbers, minlength=len(keys))
    if len(keys) < 2:
        return np.zeros(len(numbers), dtype=bool)
    wanted = max(1, round(share * len(numbers)))
    ranks = np.array([_rank(seed, key) for key in keys.to_pylist()])
    is_held_out, count = np.zeros(len(keys), dtype=bool), 0
    order = np.argsort(ranks, kind="stable")
    for prompt in order:
        if count == wanted:
            break
        if count + pairs_of[prompt] <= wanted:
            is_held_out[prompt], count = True, count + pairs_of[prompt]
    if not count:
        # Each prompt has more pairs than are wanted, so the one with the fewest is held out.
        is_held_out[order[np.argmin(pairs_of[order])]] = True
    for one_kind in has:
        with_it = order[np.isin(order, numbers[one_kind])]
        if len(with_it) > 1 and not is_held_out[with_it].any():
            is_held_out[with_it[0]] = True  # of few answers of a kind, chance may take none
    chosen: npt.NDArray[np.bool_] = is_held_out[numbers]
    return chosen


def _weighted(
    indices: Rows,
    sources: npt.NDArray[np.int32],
    train: Sequence[Source],
    pair_ids: pa.ChunkedArray,
    seed: int,
) -> Rows:
    """Repeat each index as often as the weight of its source says.

    With a weight of 2.5, every pair comes twice, and half of the pairs come a third time. The seed
    chooses that half.
    """
    times = np.array([int(source.weight) for source in train])[sources[indices]]
    for number, source in enumerate(train):
        if share := source.weight % 1:
            own = np.flatnonzero(sources[indices] == number)
            names = pair_ids.take(pa.array(indices[own])).to_pylist()
            order = np.argsort([_rank(seed, name.encode()) for name in names], kind="stable")
            times[own[order[: round(share * len(own))]]] += 1
    return np.repeat(indices, times)


def _rank(seed: int, key: bytes) -> bytes:
    return hashlib.sha256(f"{seed}:".encode() + key).digest()
