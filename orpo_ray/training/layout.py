"""Pairs to tensors: their layout for one forward pass, and the tokens that are scored.

There are three layouts:
- `padded`: chosen and rejected sides are rows, padded on the right. It is the plain reference.
- `packed`: the same sides, one after the other in a single row, without padding.
- `shared-prefix`: `[prompt|chosen|rejected]...` in a single row, so that each prompt is computed
  once. The positions of the rejected answer start after the prompt. It sees the prompt and itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orpo_ray.data.pairs import Ranges, TokenPair, ranges_of
from orpo_ray.training.plan import Layout
from orpo_ray.training.runs import Runs

PROMPT, CHOSEN, REJECTED = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """n pairs ready for one forward pass.

    `input_ids` are [rows, T]. Padded rows have an `attention_mask` [rows, T]. The single row of the
    other layouts has `position_ids` [1, T] and the `runs` for its attention.

    N tokens are scored. Token i is `targets[i]`. It is predicted at `positions[i]`, an index into
    the flattened rows. It belongs to pair `pair[i]`, and to its prompt, chosen or rejected answer:
    `part[i]`. `chosen_tokens` and `rejected_tokens` [n] count the scored tokens of the answers.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    runs: Runs | None
    positions: Tensor
    targets: Tensor
    pair: Tensor
    part: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def to(self, device: torch.device) -> "PairBatch":
        """The same batch on another device."""
        moved: dict[str, Any] = {
            field.name: _moved(getattr(self, field.name), device) for field in fields(self)
        }
        return PairBatch(**moved)


def _moved(value: Tensor | Runs | None, device: torch.device) -> Tensor | Runs | None:
    """A value on another device; a copy from pinned memory does not block."""
    if isinstance(value, Tensor) and device.type == "cuda":
        value = value.pin_memory()
    return None if value is None else value.to(device, non_blocking=True)


class _Side(NamedTuple):
    """Where one side is in the flattened rows.

    The answer's tokens start at `start`, the prompt's at `prompt_start`.
    """

    pair: int
    part: int
    prompt_start: int
    start: int


def collate(
    pairs: Sequence[TokenPair],
    layout: Layout,
    pad_id: int,
    *,
    score_prompt: bool,
    with_rejected: bool = True,
) -> PairBatch:
    """Pairs in one of the layouts; `pad_id` fills the rows of the padded one.

    The trained tokens are scored. With `score_prompt` all tokens of the chosen side's prompt are,
    from the second on.
    """
    if layout.pads:
        return _padded(pairs, pad_id, score_prompt, with_rejected)
    return _in_one_row(pairs, layout.shares_prompts, score_prompt, with_rejected)


def _padded(
    pairs: Sequence[TokenPair], pad_id: int, score_prompt: bool, with_rejected: bool
) -> PairBatch:
    """One row for each side: all chosen ones, then all rejected ones."""
    answers = [(CHOSEN, i, pair.chosen) for i, pair in enumerate(pairs)]
    if with_rejected:
        answers += [(REJECTED, i, pair.rejected) for i, pair in enumerate(pairs)]
    answers = [one for one in answers if len(one[2])]
    rows = [np.concatenate([pairs[i].prompt, answer]) for _, i, answer in answers]
    width = max(len(row) for row in rows)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    attention_mask = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = row
        attention_mask[index, : len(row)] = 1
    sides = [
        _Side(i, part, index * width, index * width + len(pairs[i].prompt))
        for index, (part, i, _) in enumerate(answers)
    ]
    return _batch(
        pairs, sides, score_prompt, input_ids, attention_mask=torch.from_numpy(attention_mask)
    )


def _in_one_row(
    pairs: Sequence[TokenPair], share: bool, score_prompt: bool, with_rejected: bool
) -> PairBatch:
    """All sides one after the other; if prompts are shared, a rejected side has none."""
    tokens: list[NDArray[np.int32]] = []
    position_ids: list[NDArray[np.int64]] = []
    runs: list[tuple[int, int]] = []
    sides: list[_Side] = []
    end = 0
    for i, pair in enumerate(pairs):
        prompt_length, prompt_start = len(pair.prompt), end
        answers = [(CHOSEN, pair.chosen)]
        if with_rejected:
            answers.append((REJECTED, pair.rejected))
        answers = [one for one in answers if len(one[1])]
        for part, answer in answers:
            shared = prompt_length if share and part == REJECTED and len(answers) > 1 else 0
            prompt_start = prompt_start if shared else end
            tokens += [pair.prompt[shared:], answer]
            length = prompt_length - shared + len(answer)
            position_ids.append(np.arange(shared, shared + length))
            runs.append((length, shared))
            sides.append(_Side(i, part, prompt_start, end + prompt_length - shared))
            end += length
    return _batch(
        pairs,
        sides,
        score_prompt,
        np.concatenate(tokens)[None].astype(np.int64),
        position_ids=torch.from_numpy(np.concatenate(position_ids)[None]),
        runs=Runs.of(runs),
    )


def _batch(
    pairs: Sequence[TokenPair],
    sides: list[_Side],
    score_prompt: bool,
    input_ids: NDArray[np.int64],
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    runs: Runs | None = None,
) -> PairBatch:
    """The batch, with the positions at which each side's tokens are predicted.

    The first token of an answer is predicted at the last token of its prompt.
    """
    trained = [pair.trained.counts for pair in pairs]
    positions, targets, owners, parts = [], [], [], []
    for side in sides:
        pair = pairs[side.pair]
        answer = pair.chosen if side.part == CHOSEN else pair.rejected
        last_of_prompt = len(pair.prompt) - 1
        if side.part == CHOSEN:
            asked = ranges_of((1, len(pair.prompt))) if score_prompt else pair.trained.prompt
            places = _places(asked)
            positions.append(side.prompt_start + places - 1)
            targets.append(pair.prompt[places])
            parts.append(np.full(len(places), PROMPT))
            owners.append(np.full(len(places), side.pair))
        places = _places(pair.trained[side.part])
        before = np.where(places == 0, side.prompt_start + last_of_prompt, side.start + places - 1)
        positions.append(before)
        targets.append(answer[places])
        parts.append(np.full(len(places), side.part))
        owners.append(np.full(len(places), side.pair))
    return PairBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=attention_mask,
        position_ids=position_ids,
        runs=runs,
        positions=torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        pair=torch.from_numpy(np.concatenate(owners)),
        part=torch.from_numpy(np.concatenate(parts)),
        chosen_tokens=torch.tensor([counts[CHOSEN] for counts in trained]),
        rejected_tokens=torch.tensor([counts[REJECTED] for counts in trained]),
    )


def _places(ranges: Ranges) -> NDArray[np.int64]:
    """Where the tokens of ranges are in their side."""
    return np.concatenate([np.arange(0), *(np.arange(start, stop) for start, stop in ranges)])
