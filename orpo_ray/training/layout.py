"""Pairs to tensors: chosen and rejected as rows padded on the right, and the places whose tokens are scored."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from orpo_ray.data.pairs import TokenPair

PROMPT, CHOSEN, REJECTED = 0, 1, 2


@dataclass(frozen=True)
class PairBatch:
    """n pairs ready for one forward pass.

    `input_ids` and `attention_mask` are [rows, T]. A scored token i of N was predicted at `positions[i]`, an index
    into the flattened rows; it is `targets[i]`, of pair `pair[i]`, in its prompt, chosen or rejected `part[i]`.
    `chosen_tokens` and `rejected_tokens` are the answers' lengths, [n].
    """

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    targets: Tensor
    pair: Tensor
    part: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def to(self, device: torch.device) -> "PairBatch":
        """The same batch on another device."""
        moved = {field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)}
        return PairBatch(**moved)


def collate_padded(
    pairs: Sequence[TokenPair], pad_id: int, *, score_prompt: bool, with_rejected: bool = True
) -> PairBatch:
    """Rows for all chosen, then all rejected sides.

    `score_prompt` adds the tokens of the chosen side's prompt (from its second on) to those that are scored.
    """
    sides = [(CHOSEN, pair.chosen) for pair in pairs]
    if with_rejected:
        sides += [(REJECTED, pair.rejected) for pair in pairs]
    rows = [np.concatenate([pairs[i % len(pairs)].prompt, answer]) for i, (_, answer) in enumerate(sides)]
    width = max(len(row) for row in rows)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    attention_mask = np.zeros((len(rows), width), dtype=np.int64)
    scored: list[tuple[np.ndarray, np.ndarray, int, np.ndarray]] = []
    for index, ((part, _), row) in enumerate(zip(sides, rows, strict=True)):
        input_ids[index, : len(row)] = row
        attention_mask[index, : len(row)] = 1
        pair_index = index % len(pairs)
        prompt_length = len(pairs[pair_index].prompt)
        first = 1 if score_prompt and part == CHOSEN else prompt_length
        places = np.arange(first, len(row))
        parts = np.where(places < prompt_length, PROMPT, part)
        scored.append((index * width + places - 1, row[first:], pair_index, parts))
    return PairBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        positions=torch.from_numpy(np.concatenate([s[0] for s in scored])),
        targets=torch.from_numpy(np.concatenate([s[1] for s in scored]).astype(np.int64)),
        pair=torch.from_numpy(np.concatenate([np.full(len(s[0]), s[2]) for s in scored])),
        part=torch.from_numpy(np.concatenate([s[3] for s in scored])),
        chosen_tokens=torch.tensor([len(pair.chosen) for pair in pairs]),
        rejected_tokens=torch.tensor([len(pair.rejected) for pair in pairs]),
    )


def longer_side(lengths: np.ndarray) -> np.ndarray:
    """Tokens of a pair's longer row, [n], from its (prompt, chosen, rejected) lengths [n, 3]."""
    return lengths[:, 0] + lengths[:, 1:].max(axis=1)
