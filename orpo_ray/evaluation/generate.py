"""Greedy answers of a model, which show more than its accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from orpo_ray.data.endings import end_ids
from orpo_ray.models.tokenizer import padding_id
from orpo_ray.training.pair_model import PairModel


@dataclass(frozen=True)
class Answer:
    """An answer of a model. `is_cut`: it reached a limit before it ended."""

    text: str
    is_cut: bool


@torch.no_grad()
def greedy_answers(
    model: PairModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[Answer]:
    """One answer for each prompt of token ids, in order, without special tokens.

    Prompts of similar length form a batch, padded on the left. No answer goes beyond the positions
    that the base can read. An answer ends with any token that ends one in training, or that the
    base's own generation_config.json lists.
    """
    model.eval()
    generate: Any = model.model.generate
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    pad_id = padding_id(tokenizer)
    ends = end_ids(tokenizer, model.model.generation_config)
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        width = max(len(prompts[index]) for index in chunk)
        room = (
            max_new_tokens
            if model.positions is None
            else min(max_new_tokens, model.positions - width)
        )
        ids = torch.full((len(chunk), width), pad_id)
        mask = torch.zeros((len(chunk), width), dtype=torch.long)
        for row, index in enumerate(chunk):
            ids[row, width - len(prompts[index]) :] = torch.as_tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        with torch.autocast(
            model.device.type, dtype=model.autocast, enabled=model.autocast is not None
        ):
            out = generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=False,
                max_new_tokens=room,
                pad_token_id=pad_id,
                eos_token_id=ends,
                use_cache=True,
            )
        said = out[:, width:]
        ended = torch.isin(said.cpu(), torch.tensor(ends)).any(dim=1).tolist()
        texts = tokenizer.batch_decode(said, skip_special_tokens=True)
        for index, text, has_end in zip(chunk, texts, ended, strict=True):
            answers[index] = Answer(text.strip(), is_cut=not has_end)
    return [answers[index] for index in range(len(prompts))]
