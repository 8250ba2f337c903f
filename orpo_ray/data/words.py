"""Token ids word by word, with a memory of the words seen.

A byte-level BPE cuts a text into words by a pattern, then turns each word into ids by itself. Words
come again and again, so most are looked up. The library does all of it for each text, which takes
about five times as long. Its ids are the truth: where the pattern may cut in another way here than
there, the text goes to the library.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import regex
from tokenizers.pre_tokenizers import ByteLevel

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern of a ByteLevel that cuts (tokenizers, `pre_tokenizers/byte_level.rs`)."""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}|", r"\p{N}|")
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = frozenset({_LLAMA3, _QWEN2, _O200K})
"""Patterns that mean the same here and in Oniguruma, with which the library cuts.

Others may not: `{1,3}+` and `$` are two things. So no other pattern is used.
"""
Encode = Callable[[list[str]], list[list[int]]]
_MOST_WORDS, _LONGEST_WORD = 2**16, 24
"""What is remembered: longer words are rarer and take more memory."""
_PROBES = ("{0}", "{0}{0}", "a{0}b", "A{0}B", "1{0}2", " {0} ", "!{0}!", "\n{0}\n", "'{0} {0}s")
"""A pattern tells characters apart by their class alone. These show to which one each belongs."""


class Words:
    """Turns texts into the ids that a tokenizer gives them, without special ones around them."""

    def __init__(self, tokenizer: Any, cut: regex.Pattern[str]) -> None:
        """Use `words_of`, which knows the tokenizers that this holds for."""
        backend = tokenizer.backend_tokenizer
        self._backend = backend
        self._cut = cut
        self._as_bytes = ByteLevel(add_prefix_space=False, use_regex=False)
        self._marks = {
            token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()
        }
        self._at_marks = regex.compile(
            "|".join(map(regex.escape, sorted(self._marks, key=len, reverse=True))) or "(?!)"
        )
        self._ids: dict[str, list[int]] = {}
        self._known: dict[str, bool] = {}
        """Whether a character is of the same class in both patterns, of those seen so far."""

    def encode(self, texts: Sequence[str], by_library: Encode) -> list[list[int]]:
        """The ids of each text; `by_library` finds those of texts that it must cut."""
        found = [self._encode(text) for text in texts]
        left = [place for place, ids in enumerate(found) if ids is None]
        for place, ids in zip(left, by_library([texts[place] for place in left]), strict=True):
            found[place] = ids
        return [ids for ids in found if ids is not None]

    def _encode(self, text: str) -> list[int] | None:
        """The ids of a text; None if the library must cut it."""
        if not all(self._is_known(one) for one in set(text)):
            return None
        ids: list[int] = []
        start = 0
        for mark in self._at_marks.finditer(text):
            if not self._add(text[start : mark.start()], ids):
                return None
            ids.append(self._marks[mark.group()])
            start = mark.end()
        return ids if self._add(text[start:], ids) else None

    def _add(self, text: str, ids: list[int]) -> bool:
        """Add the ids of a text without marks; False if the pattern leaves something out."""
        known = self._ids
        words = self._cut.findall(text)
        for word in words:
            found = known.get(word)
            if found is None:
                found = self._of_word(word)
            ids += found
        return sum(map(len, words)) == len(text)

    def _of_word(self, word: str) -> list[int]:
        ((as_bytes, _),) = self._as_bytes.pre_tokenize_str(word)
        ids = [token.id for token in self._backend.model.tokenize(as_bytes)]
        if len(self._ids) >= _MOST_WORDS:
            self._ids.clear()
        if len(word) <= _LONGEST_WORD:
            self._ids[word] = ids
        return ids

    def _is_known(self, one: str) -> bool:
        known = self._known.get(one)
        if known is None:
            known = self._known[one] = self._agrees(one)
        return known

    def _agrees(self, one: str) -> bool:
        """Whether both patterns cut texts around a character in the same places."""
        return all(self._cuts_alike(probe.format(one)) for probe in _PROBES)

    def _cuts_alike(self, text: str) -> bool:
        theirs = [
            text[slice(*place)] for _, place in self._backend.pre_tokenizer.pre_tokenize_str(text)
        ]
        return bool(self._cut.findall(text) == theirs)


def words_of(tokenizer: Any) -> Words | None:
    """The words of a tokenizer; None for one that does not take each word by itself."""
    if not tokenizer.is_fast:
        return None
    backend = tokenizer.backend_tokenizer
    added = tokenizer.added_tokens_decoder.values()
    plain = not any(token.lstrip or token.rstrip or token.single_word for token in added)
    # Those that are normalised are looked for in what the others leave.
    in_one_go = len({token.normalized for token in added}) < 2
    is_bpe = type(backend.model).__name__ == "BPE" and not backend.model.dropout
    pattern = _pattern_of(backend)
    if not (plain and in_one_go and is_bpe) or backend.normalizer is not None or pattern is None:
        return None
    return Words(tokenizer, regex.compile(pattern))


def _pattern_of(backend: Any) -> str | None:
    """The one pattern that cuts texts into words of bytes; None if it is done in another way."""
    if backend.pre_tokenizer is None:
        return None
    found = json.loads(backend.pre_tokenizer.__getstate__())
    if found["type"] == "ByteLevel" and found["use_regex"] and not found["add_prefix_space"]:
        return _GPT2
    match found.get("pretokenizers"):
        case [
            {
                "type": "Split",
                "pattern": {"Regex": str(pattern)},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if pattern in _PATTERNS:
            return pattern
    return None
