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
Encode = Callable[[list[str]], list[list[int]]]
_MOST_WORDS = 2**18
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
        self._known = {chr(code): True for code in range(128)}
        """Whether a character is of the same class in both patterns."""
        for one in list(self._known):
            self._known[one] = self._agrees(one)

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
                found = known[word] = self._of_word(word)
            ids += found
        return sum(map(len, words)) == len(text)

    def _of_word(self, word: str) -> list[int]:
        if len(self._ids) >= _MOST_WORDS:
            self._ids.clear()
        ((as_bytes, _),) = self._as_bytes.pre_tokenize_str(word)
        return [token.id for token in self._backend.model.tokenize(as_bytes)]

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
    if not tokenizer.is_fast or tokenizer.split_special_tokens:
        return None
    backend = tokenizer.backend_tokenizer
    plain = all(
        not (token.lstrip or token.rstrip or token.single_word)
        for token in tokenizer.added_tokens_decoder.values()
    )
    model = backend.model
    is_bpe = type(model).__name__ == "BPE" and not model.dropout
    cut = _pattern_of(backend)
    if not (plain and is_bpe) or backend.normalizer is not None or cut is None:
        return None
    return Words(tokenizer, cut)


def _pattern_of(backend: Any) -> regex.Pattern[str] | None:
    """The one pattern that cuts texts into words of bytes; None if it is done in another way."""
    if backend.pre_tokenizer is None:
        return None
    found = json.loads(backend.pre_tokenizer.__getstate__())
    pattern: str | None = None
    if found["type"] == "ByteLevel" and found["use_regex"] and not found["add_prefix_space"]:
        pattern = _GPT2
    match found.get("pretokenizers"):
        case [
            {
                "type": "Split",
                "pattern": {"Regex": written},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            pattern = written
    if pattern is None:
        return None
    try:
        compiled = regex.compile(pattern)
    except regex.error:
        return None  # it is written for another library of patterns
    return compiled if not compiled.groups and compiled.fullmatch("") is None else None
