"""A prompt is tokenised once, and only its end again with each answer.

The ids are still those of the whole text.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from text_pairs import text_pair
from tokenizers import AddedToken
from transformers import AutoTokenizer

from orpo_ray.data.pairs import Pair, TokenPair
from orpo_ray.data.tokenise import PairTokeniser

BASE = Path(__file__).resolve().parents[2] / "orpo_ray" / "demo" / "base"
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] "
    "+ eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)


def pairs(mark: str) -> list[Pair]:
    """Answers that start with white space, and prompts that hold a special token as text."""
    prompts = [
        "Hello there",
        f"{mark} {mark}{mark}",
        f"end {mark}",
        f"{mark[:-1]}",
        "two\n\nlines  ",
    ]
    answers = ["Yes.", "\n\nYes.", "  Yes", f"{mark[1:]} yes"]
    return [
        text_pair([{"role": "user", "content": p}], a, a + " No.") for p in prompts for a in answers
    ]


def ids(tokeniser: PairTokeniser, rows: list[Pair]) -> list[Any]:
    found = tokeniser.pairs(rows, [str(number) for number in range(len(rows))])
    return [
        [part.tolist() for part in (one.prompt, one.chosen, one.rejected)]
        if isinstance(one, TokenPair)
        else one
        for one in found
    ]


def check(tokenizer: Any, mark: str) -> None:
    """The ids are the same as without a cut, and far fewer characters are tokenised."""
    whole, cut = PairTokeniser(tokenizer), PairTokeniser(tokenizer)
    whole._cuts = {}
    assert ids(cut, pairs(mark)) == ids(whole, pairs(mark))
    read: list[int] = []
    for tokeniser in (cut, whole):
        sizes, encode = [0], tokeniser._encode
        tokeniser._encode = lambda texts, s=sizes, e=encode: (
            s.append(sum(map(len, texts))) or e(texts)
        )  # type: ignore
        ids(tokeniser, [text_pair([{"role": "user", "content": "long " * 300}], "short", "brief")])
        read.append(sum(sizes))
    assert read[0] < read[1] / 2.5


def test_chatml() -> None:
    check(AutoTokenizer.from_pretrained(BASE), "<|im_start|>")


def test_instruction_marks_of_a_sentencepiece_tokenizer(
    shared_tokenizer: Callable[..., Any],
) -> None:
    check(shared_tokenizer("mistral_v3_32768_spm", INST), "[/INST]")


@pytest.mark.parametrize("flag", ["lstrip", "single_word"])
def test_no_cut_at_a_token_that_looks_to_its_left(flag: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_tokens([AddedToken("<turn>", special=True, normalized=False, **{flag: True})])
    tokenizer.add_tokens(
        [
            AddedToken("<cut>", special=True, normalized=False),
            AddedToken("x<cut>y", normalized=False),
        ]
    )
    cuts = set(PairTokeniser(tokenizer)._cuts.values())
    assert "<|im_start|>" in cuts
    assert not {"<turn>", "<cut>"} & cuts


def test_ids_do_not_depend_on_padding_that_others_switched_on() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokeniser = PairTokeniser(tokenizer)
    before = ids(tokeniser, pairs("<|im_end|>"))
    tokenizer(["one", "one two three"], padding=True, truncation=True, max_length=2)
    assert ids(tokeniser, pairs("<|im_end|>")) == before
