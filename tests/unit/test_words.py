"""Ids word by word are those of the tokenizer, for any text."""

import random
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BASE
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from orpo_ray.data.tokenise import PairTokeniser
from orpo_ray.data.words import _LLAMA3, _O200K, _QWEN2, Words, words_of

PATTERNS = {"gpt2": None, "qwen2": _QWEN2, "llama3": _LLAMA3, "o200k": _O200K}
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


def with_pattern(tokenizer: Any, pattern: str | None) -> Any:
    """The tokenizer with another pattern that cuts words, in the form of Llama 3."""
    if pattern is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    return tokenizer


@pytest.fixture(scope="module")
def demo() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


def library(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    backend = tokenizer.backend_tokenizer
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def ids_of(words: Words, tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return words.encode(texts, partial(library, tokenizer))


def found(tokenizer: Any) -> Words:
    words = words_of(tokenizer)
    assert words is not None
    return words


TRICKY = [
    "",
    " ",
    "\n",
    "a\x1cb \x1d\x1e\x1f c\x85d\xa0e\u180e\u2028f\u3000g\ufeff",
    "It's I'LL they'Re ca\u2019n't  don\u017ft",
    "  two  spaces \t tab\r\n\r\n\n end  ",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_start|> <|im_end|>x<|im_end",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u0661\u0662 \u00bd \u2167 \u00b2 e\u0301 \u0130I\u0307",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f600\ufe0f \U00020000 \U000e0001 \U0010ffff",
    "\u1c89\u1c8a \ua7cb \U000105c0 \U00016d40",  # letters of recent versions of Unicode
    "1234567 12,345.67e-8 x=1;y/2//\n",
]


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_tricky_texts_have_the_ids_of_the_library(pattern: str | None, demo: Any) -> None:
    tokenizer = with_pattern(deepcopy(demo), pattern)
    words = found(tokenizer)
    for _ in range(2):  # the second time from memory
        assert ids_of(words, tokenizer, TRICKY) == library(tokenizer, TRICKY)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_any_text_has_the_ids_of_the_library(pattern: str | None, demo: Any) -> None:
    tokenizer = with_pattern(deepcopy(demo), pattern)
    words = found(tokenizer)
    alphabet = st.one_of(
        st.sampled_from([*"ab'sL1 \n\r\t!.<|>", "<|im_start|>", "<|im_end|>", "\u00e9", "\u4f60"]),
        st.characters(exclude_categories=["Cs"]),
    )

    @settings(max_examples=300, deadline=None)
    @given(st.lists(alphabet, max_size=40).map("".join))
    def check(text: str) -> None:
        assert ids_of(words, tokenizer, [text]) == library(tokenizer, [text])

    check()


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_every_character_has_the_ids_of_the_library(pattern: str | None, demo: Any) -> None:
    tokenizer = with_pattern(deepcopy(demo), pattern)
    words = found(tokenizer)
    some = random.Random(0).sample([*range(128, 0xD800), *range(0xE000, 0x110000)], 3000)
    around = [f"a{chr(code)}s {chr(code)}1\n{chr(code)} {chr(code)}'" for code in some]
    assert ids_of(words, tokenizer, around) == library(tokenizer, around)


def test_most_texts_need_no_library(demo: Any) -> None:
    def refuse(texts: list[str]) -> list[list[int]]:
        assert not texts
        return []

    texts = [
        "<|im_start|>user\nWhat\u2019s \u201cthat\u201d caf\u00e9?<|im_end|>\n",
        "\u4f60\u597d\uff0c \u0417\u0434\u0440\u0430 \U0001f600 1234 x=1;\n\n\tend  ",
    ]
    assert found(demo).encode(texts, refuse) == library(demo, texts)


def test_memory_stays_bounded(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orpo_ray.data.words._MOST_WORDS", 8)
    words = found(demo)
    text = " ".join(f"word{number}" for number in range(100))
    assert ids_of(words, demo, [text]) == library(demo, [text])
    assert len(words._ids) <= 8
    ids_of(words, demo, ["q" * 1000])
    assert "q" * 1000 not in words._ids


def test_shared_tokenizers(shared_tokenizer: Callable[..., Any]) -> None:
    for name in ("minimind_chatml_6400", "gpt2_50257", "torchtune_tiny_2000"):
        tokenizer = shared_tokenizer(name)
        assert ids_of(found(tokenizer), tokenizer, TRICKY) == library(tokenizer, TRICKY), name
    assert words_of(shared_tokenizer("mistral_v3_32768_spm")) is None


def test_tokenizers_that_take_no_word_by_itself_are_left_to_the_library(demo: Any) -> None:
    from tokenizers import AddedToken, normalizers

    spaced = deepcopy(demo)
    spaced.add_tokens([AddedToken("<x>", lstrip=True)])
    assert words_of(spaced) is None
    prefixed = deepcopy(demo)
    prefixed.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert words_of(prefixed) is None
    normal = deepcopy(demo)
    normal.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert words_of(normal) is None
    for pattern in (CL100K, r"\p{L}+|\s+$", r"\s*"):  # {1,3}+ and $ are two things in two libraries
        assert words_of(with_pattern(deepcopy(demo), pattern)) is None, pattern
    two_passes = deepcopy(demo)
    two_passes.add_tokens([AddedToken("ab<", normalized=True)])
    assert words_of(two_passes) is None


def test_special_tokens_that_are_split_are_split(demo: Any) -> None:
    tokenizer = deepcopy(demo)
    tokeniser = PairTokeniser(tokenizer)
    tokenizer.split_special_tokens = True
    (ids,) = tokeniser.prompts([[{"role": "user", "content": "hi"}]])
    assert not set(ids) & set(tokenizer.added_tokens_decoder)
