"""Pairs whose answers are texts, as tests write most of them, and a tokenizer for them."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orpo_ray.config.data import Columns
from orpo_ray.data.formats import Reading, read_pairs
from orpo_ray.data.pairs import Message, Pair, Refusal, Row


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def text_pair(prompt: list[Message], chosen: str, rejected: str) -> Pair:
    """A prompt and two answers that have nothing but a text."""
    return Pair(prompt=prompt, chosen=assistant(chosen), rejected=assistant(rejected))


def read_pair(
    row: Row, columns: Columns | None = None, single_answers: bool = False
) -> Pair | Refusal:
    """The only pair in a row, or why there is none."""
    found = read_pairs(row, Reading(columns, single_answers=single_answers))
    if isinstance(found, Refusal):
        return found
    [pair] = found
    return pair


SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|system|>", "<|tool|>"),
    *("<|assistant|>", "<|Assistant|>"),
]


def tokenizer_of(template: str) -> Any:
    """One token a byte, so that ids are equal where texts are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer
