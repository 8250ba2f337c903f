"""The one truth about where an answer ends: for training, for evaluation and for generation."""

import re
from collections.abc import Collection
from typing import Any

from jinja2 import TemplateError

from orpo_ray.data.pairs import Message
from orpo_ray.errors import DataError

_ASKED, _SAID = "xAsked", "xSaid"
_PROBE: list[Message] = [
    {"role": "user", "content": _ASKED},
    {"role": "assistant", "content": _SAID},
]
_INSIDE_TURNS = re.compile(r"</?(think|thinking|reasoning|tool\w*)>")


class Endings:
    """The tokens that end an answer, and the marks that a tokenizer's chat template writes.

    An answer ends with the token that the template writes after it: its own end token or the
    tokenizer's `eos_token`. Both end an answer wherever it is read or generated. Raises DataError
    for a template whose answers end with no token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._special = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special and not _INSIDE_TURNS.fullmatch(token.content)
        } | {tokenizer.eos_token: tokenizer.eos_token_id}
        around = _written_around(tokenizer)
        self.marks = self._marks(tokenizer, "".join(around or ()))
        """Texts that only the template writes."""
        self.texts = {tokenizer.eos_token: tokenizer.eos_token_id}
        """End tokens by their texts, the template's own among them."""
        if around is not None:
            found = self.split("".join(around[-1:]))
            if found is None:
                raise DataError(
                    "the chat template ends an answer with no end token, so a model would never "
                    "learn to stop; name another with model.chat_template"
                )
            self.texts[_text_of(self._special, found[1])] = found[1]
        self.ids = frozenset(self.texts.values())

    def text_of(self, end: int) -> str:
        """The text of an end token that `split` has found."""
        return _text_of(self._special, end)

    def split(self, rendered: str) -> tuple[str, int] | None:
        """A rendered answer without the end token, and that token's id.

        None if the answer does not end with a special token. If several end tokens follow each
        other, generation stops at the first, so the answer ends there.
        """
        found: int | None = None
        while (text := _last(rendered.rstrip(), self._special)) is not None:
            if found is not None and text not in self.texts:
                break
            found = self._special[text]
            rendered = rendered.rstrip().removesuffix(text)
        return None if found is None else (rendered, found)

    def without_end(self, answer: str) -> str:
        """A text of the data without the end tokens at its end, which the template writes too."""
        while (text := _last(answer.rstrip(), self.texts)) is not None:
            answer = answer.rstrip().removesuffix(text)
        return answer

    def _marks(self, tokenizer: Any, written: str) -> tuple[str, ...]:
        """Special tokens that the template writes, and its first word if it is like [INST]."""
        text = written.removeprefix(tokenizer.bos_token or "").lstrip()
        signs = re.match(r"[\[<]\S+", text)
        first = (signs.group(),) if signs else ()
        return (*(mark for mark in self._special if mark in text), *first)


def end_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """Every token at which generation stops: the template's, the tokenizer's and the base's own.

    The base's own are those of its generation_config.json.
    """
    own = getattr(generation_config, "eos_token_id", None)
    listed = own if isinstance(own, list | tuple) else [own]
    return sorted({*Endings(tokenizer).ids, *(int(each) for each in listed if each is not None)})


def _written_around(tokenizer: Any) -> tuple[str, str, str] | None:
    """What the template writes before, between and after a question and an answer.

    None if it refuses such a conversation or does not write both.
    """
    try:
        text = str(tokenizer.apply_chat_template(_PROBE, tokenize=False))
    except TemplateError:
        return None
    before, asked, rest = text.partition(_ASKED)
    between, said, after = rest.partition(_SAID)
    return (before, between, after) if asked and said else None


def _last(text: str, known: Collection[str]) -> str | None:
    """The longest known text with which a text ends."""
    return max((each for each in known if text.endswith(each)), key=len, default=None)


def _text_of(special: dict[str, int], token_id: int) -> str:
    return next(text for text, each in special.items() if each == token_id)
