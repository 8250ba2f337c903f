"""Answers of a model to prompts: the likeliest ones, or drawn ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from orpo_ray.data.endings import end_ids
from orpo_ray.errors import ResourceError
from orpo_ray.evaluation.batches import Room, cut_batches
from orpo_ray.evaluation.orders import Sampling
from orpo_ray.models.tokenizer import padding_id
from orpo_ray.training.pair_model import PairModel

TOKENS_PER_BATCH = 8192
"""The most tokens of a batch, with its padding and with answers of full length."""


@dataclass(frozen=True)
class Answer:
    """An answer of a model, without special tokens.

    `tokens` counts those that the model wrote. `is_cut`: it reached a limit before it ended.
    """

    text: str
    is_cut: bool
    tokens: int


def answers_of(
    model: PairModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[Answer]:
    """One answer for each prompt of token ids, in order.

    No answer goes beyond the positions that the base can read. An answer ends with any token that
    ends one in training, or that the base's own generation_config.json lists.
    """
    found: dict[int, Answer] = {}
    lengths = [len(prompt) for prompt in prompts]
    room = Room(sampling.max_new_tokens, tokens_per_batch, model.positions)
    for batch in cut_batches(lengths, room):
        some = answer_batch(model, tokenizer, [prompts[number] for number in batch], sampling)
        found.update(zip(batch, some, strict=True))
    return [found[number] for number in range(len(prompts))]


@torch.no_grad()
def answer_batch(
    model: PairModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
) -> list[Answer]:
    """Answers to prompts that are padded on the left to one width.

    Drawn answers depend on the seed and on the batch alone. Raises ResourceError if there is not
    enough memory.
    """
    model.eval()
    width = max(map(len, prompts))
    ends = end_ids(tokenizer, model.model.generation_config)
    pad_id = padding_id(tokenizer)
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    room = _room(model, width, sampling.max_new_tokens)
    if room < 1:
        return [Answer("", is_cut=True, tokens=0) for _ in prompts]
    generate: Any = model.model.generate
    torch.manual_seed(sampling.seed)
    try:
        with torch.autocast(
            model.device.type, dtype=model.autocast, enabled=model.autocast is not None
        ):
            out = generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=room,
                pad_token_id=pad_id,
                eos_token_id=ends,
                use_cache=True,
                **_choice(sampling),
            )
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"no room in memory for {len(prompts)} answers of {room} tokens to prompts of {width}; "
            "lower --batch-tokens or --max-new-tokens"
        ) from error
    return [_answer(tokenizer, said, ends) for said in out[:, width:].cpu()]


def _room(model: PairModel, width: int, wanted: int) -> int:
    """How many tokens an answer may have after prompts of this width."""
    return wanted if model.positions is None else min(wanted, model.positions - width)


def _choice(sampling: Sampling) -> dict[str, Any]:
    if not sampling.temperature:
        return {"do_sample": False}
    # top_k is the library's own limit, which nobody asked for.
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
    }


def _answer(tokenizer: PreTrainedTokenizerBase, said: Tensor, ends: Sequence[int]) -> Answer:
    """What was said up to its end token. Padding follows that token."""
    ended = torch.isin(said, torch.tensor(ends)).nonzero()
    stop = int(ended[0]) if len(ended) else len(said)
    text: Any = tokenizer.decode(said[:stop], skip_special_tokens=True)
    return Answer(text.strip(), is_cut=not len(ended), tokens=stop)
