"""Pairs to tensors: their layout for one forward pass, and the tokens that are scored.

There are three layouts:
- `padded`: chosen and rejected sides are rows, padded on the right. It is the plain reference.
- `packed`: the same sides, one after the other in a single row, without padding.
- `shared-prefix`: `[prompt|chosen|rejected]...` in a single row, so that each prompt is computed
  once. The positions of the rejected answer start after the prompt. It sees the prompt and itself.
  If all prompts begin alike, as with the system prompt of a chat template, the row begins with
  that, and the prompts go on from there.
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
MIN_JOINED = 0.1
"""The share of a row's tokens that joining the beginnings of its prompts must save.

If it saves less, the row takes more memory than it does unjoined, which is what is tried: a run
that begins elsewhere has copies of its keys, and on a CPU a mask.
"""


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """n pairs ready for one forward pass.

    `input_ids` are [rows, T]. Padded rows have an `attention_mask` [rows, T]. The single row of the
    other layouts has `position_ids` [1, T] and the `runs` for its attention.

    N tokens are scored. Token i is `targets[i]`. It is predicted at `positions[i]`, an index into
    the flattened rows. It belongs to pair `pair[i]`, and to its prompt, chosen or rejected answer:
    `part[i]`. `chosen_tokens` and `rejected_tokens` [n] count the scored tokens of the answers.

    If prompts have tokens in common, fewer than N are computed: `targets` and `positions` are those
    of different tokens, and token i of `pair` and `part` is number `computed[i]` of them.
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
    computed: Tensor | None = None

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

    The answer's tokens start at `start`. Token t of the prompt is at `prompt_start` + t, or at t if
    it is one of the `common` ones.
    """

    pair: int
    part: int
    prompt_start: int
    start: int
    common: int = 0

    def of_prompt(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where tokens of the prompt are."""
        return np.where(places < self.common, places, self.prompt_start + places)


def collate(
    pairs: Sequence[TokenPair],
    layout: Layout,
    pad_id: int,
    *,
    score_prompt: bool,
    with_rejected: bool = True,
    joins_beginnings: bool = True,
) -> PairBatch:
    """Pairs in one of the layouts; `pad_id` fills the rows of the padded one.

    The trained tokens are scored. With `score_prompt` all tokens of the chosen side's prompt are,
    from the second on. Where prompts are shared, `joins_beginnings` has what all of them begin with
    computed once.
    """
    if layout.pads:
        return _padded(pairs, pad_id, score_prompt, with_rejected)
    joins = joins_beginnings and layout.shares_prompts
    common = common_tokens(pairs, with_rejected=with_rejected) if joins else 0
    return _in_one_row(pairs, layout.shares_prompts, score_prompt, with_rejected, common)


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
    pairs: Sequence[TokenPair], share: bool, score_prompt: bool, with_rejected: bool, common: int
) -> PairBatch:
    """All sides one after the other; if prompts are shared, a rejected side has none.

    `common` tokens that all prompts begin with come first, and no side has them.
    """
    tokens: list[NDArray[np.int32]] = []
    position_ids: list[NDArray[np.int64]] = []
    runs: list[tuple[int, int]] = []
    if common:
        tokens.append(pairs[0].prompt[:common])
        position_ids.append(np.arange(common))
        runs.append((common, 0))
    sides: list[_Side] = []
    end = common
    for i, pair in enumerate(pairs):
        prompt_length, prompt_start = len(pair.prompt), end - common
        answers = [(CHOSEN, pair.chosen)]
        if with_rejected:
            answers.append((REJECTED, pair.rejected))
        answers = [one for one in answers if len(one[1])]
        for part, answer in answers:
            is_second = share and part == REJECTED and len(answers) > 1
            shared = prompt_length if is_second else common
            prompt_start = prompt_start if is_second else end - common
            tokens += [pair.prompt[shared:], answer]
            length = prompt_length - shared + len(answer)
            position_ids.append(np.arange(shared, shared + length))
            runs.append((length, shared))
            sides.append(_Side(i, part, prompt_start, end + prompt_length - shared, common))
            end += length
    return _batch(
        pairs,
        sides,
        score_prompt,
        np.concatenate(tokens)[None].astype(np.int64),
        position_ids=torch.from_numpy(np.concatenate(position_ids)[None]),
        runs=Runs.of(runs, common),
    )


def common_tokens(pairs: Sequence[TokenPair], *, with_rejected: bool = True) -> int:
    """How many tokens all prompts begin with; 0 if joining them saves too little."""
    first, length = pairs[0].prompt, min(len(pair.prompt) for pair in pairs)
    for pair in pairs[1:]:
        others = np.flatnonzero(pair.prompt[:length] != first[:length])
        length = int(others[0]) if len(others) else length
    tokens = sum(
        len(pair.prompt) + len(pair.chosen) + len(pair.rejected) * with_rejected for pair in pairs
    )
    return length if length * (len(pairs) - 1) >= MIN_JOINED * tokens else 0


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
        last_of_prompt = side.of_prompt(np.array(len(pair.prompt) - 1))
        if side.part == CHOSEN:
            asked = ranges_of((1, len(pair.prompt))) if score_prompt else pair.trained.prompt
            places = _places(asked)
            positions.append(side.of_prompt(places - 1))
            targets.append(pair.prompt[places])
            parts.append(np.full(len(places), PROMPT))
            owners.append(np.full(len(places), side.pair))
        places = _places(pair.trained[side.part])
        before = np.where(places == 0, last_of_prompt, side.start + places - 1)
        positions.append(before)
        targets.append(answer[places])
        parts.append(np.full(len(places), side.part))
        owners.append(np.full(len(places), side.pair))
    scored = np.stack([np.concatenate(positions), np.concatenate(targets)]).astype(np.int64)
    computed = None
    if runs is not None and runs.common:
        scored, inverse = np.unique(scored, axis=1, return_inverse=True)
        computed = torch.from_numpy(inverse.reshape(-1))
    return PairBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=attention_mask,
        position_ids=position_ids,
        runs=runs,
        positions=torch.from_numpy(scored[0]),
        targets=torch.from_numpy(scored[1]),
        computed=computed,
        pair=torch.from_numpy(np.concatenate(owners)),
        part=torch.from_numpy(np.concatenate(parts)),
        chosen_tokens=torch.tensor([counts[CHOSEN] for counts in trained]),
        rejected_tokens=torch.tensor([counts[REJECTED] for counts in trained]),
    )


def _places(ranges: Ranges) -> NDArray[np.int64]:
    """Where the tokens of ranges are in their side."""
    return np.concatenate([np.arange(0), *(np.arange(start, stop) for start, stop in ranges)])
