"""The one truth about where an answer ends: for training, for evaluation and for generation."""

import re
from collections.abc import Collection, Sequence
from typing import Any

from orpo_ray.data.marks import END_MARKS, FAMILIES, START_MARKS, TURN_MARKS, Marks
from orpo_ray.data.pairs import Message, Refusal
from orpo_ray.errors import DataError

_ASKED, _SAID = "xAsked", "xSaid"
_PROBE: list[Message] = [
    {"role": "user", "content": _ASKED},
    {"role": "assistant", "content": _SAID},
]
_PROBES: tuple[list[Message], ...] = (
    _PROBE,
    [{"role": "system", "content": "x"}, *_PROBE],
    [*_PROBE, {"role": "tool", "content": "x"}],
)
_CALL: dict[str, Any] = {"name": "xCalled", "arguments": {"x": "x"}}
_CALLS: list[Message] = [
    _PROBE[0],
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "x",
        "tool_calls": [{"id": "xxxxxxxxx", "type": "function", "function": _CALL}],
    },
]
_OF_CALLS = re.compile(r"(tool|function).?(call|sep)|python_tag", re.IGNORECASE)
"""Names of special tokens of calls, for a template that writes no such call as the probe's."""
_INSIDE_TURNS = re.compile(r"</?(think|thinking|reasoning|tool\w*)>")


class Endings:
    """The tokens that end an answer, and the marks that no text of the data may have.

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
        written = [_rendered(tokenizer, probe) or "" for probe in _PROBES]
        around = _written_around(written[0])
        self.texts = {tokenizer.eos_token: tokenizer.eos_token_id}
        """End tokens by their texts, the template's own among them."""
        self.own = str(tokenizer.eos_token)
        """The end token that the template writes after an answer."""
        if around is not None:
            # Some templates write eos_token after the last turn, whose own end token comes first.
            turn_end = _first(around[1].lstrip(), self._special)
            if turn_end is not None and turn_end == _first(around[2].lstrip(), self._special):
                self.texts[turn_end] = self._special[turn_end]
            found = self.split(around[2])
            if found is None:
                raise DataError(
                    "the chat template ends an answer with no end token, so a model would never "
                    "learn to stop; name another with model.chat_template"
                )
            self.own = _text_of(self._special, found[1])
            self.texts[self.own] = found[1]
        self.ids = frozenset(self.texts.values())
        self._ends = frozenset({*self.texts, *END_MARKS})
        self._set_marks(tokenizer, around, "".join(written))

    def _set_marks(self, tokenizer: Any, around: tuple[str, str, str] | None, written: str) -> None:
        bos = str(tokenizer.bos_token or "")
        before = around[0] if around is not None else ""
        source = str(tokenizer.chat_template) if written else ""
        known = (*sorted({*self._special, *TURN_MARKS}, key=len, reverse=True),)
        self._bos = bos
        self._writes_bos = bool(bos) and before.startswith(bos)
        self.begins_with_text = around is not None and before.removeprefix(bos) == ""
        """Whether the template writes the first text at once, with no mark of its own before it."""
        self._twin = next(
            (
                family.end
                for family in FAMILIES
                if family.end
                and family.end not in written
                and all(mark in written for mark in family.starts)
            ),
            self.own,
        )
        # A template may begin a turn with a sign that is no token of its own.
        sign = re.match(r"[\[<]\S+", before.removeprefix(bos).lstrip())
        marks = (*known, *((sign.group(),) if sign else ()))
        turns = {*TURN_MARKS, *END_MARKS, *START_MARKS, bos, *self.texts}
        called = (_rendered(tokenizer, _CALLS) or "").partition(_ASKED)[2]
        spoken = {
            mark
            for mark in self._special
            if mark not in written
            and (mark in called or (mark in source and _OF_CALLS.search(mark)))
        } - turns
        self.in_text = Marks(marks)
        """Marks that no text may have."""
        self.in_answer = Marks(mark for mark in marks if mark not in spoken)
        """Marks that no turn of the model may have. It may write those of its tool calls."""
        foreign = (*known, *END_MARKS, *START_MARKS)
        self._in_rendered = Marks(
            mark for mark in foreign if mark not in spoken and mark not in written
        )

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
        """A text of the data without the end tokens at its end, which the template writes too.

        Those of other families count, too: the answer was written for another model.
        """
        while (text := _last(answer.rstrip(), self._ends)) is not None:
            if text == "</s>" and text not in self.texts and "<s>" in answer:
                break  # HTML
            answer = answer.rstrip().removesuffix(text)
        return answer

    def without_start(self, text: str) -> str:
        """A text without the start tokens that it begins with."""
        while self._bos and text.startswith(self._bos):
            text = text.removeprefix(self._bos)
        return text

    def as_written(self, rendered: str) -> str | Refusal:
        """A prompt that was rendered before, with the start and the ends that this template writes.

        A tokenizer of another family may lack the family's own: `eos_token` ends its turns then.
        Other marks of other families are a reason to refuse it.
        """
        text = rendered.lstrip()
        start = self._bos if self._writes_bos or (self._bos and text.startswith(self._bos)) else ""
        marks = tuple(mark for mark in (self._bos, *START_MARKS) if mark)
        while (mark := next((each for each in marks if text.startswith(each)), None)) is not None:
            text = text.removeprefix(mark)
        text = text.replace(self._twin, self.own)
        if mark := self._in_rendered.first_in(text):
            return Refusal("template-inside", f"the prompt has {mark}")
        return start + text


def end_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """Every token at which generation stops: the template's, the tokenizer's and the base's own.

    The base's own are those of its generation_config.json.
    """
    own = getattr(generation_config, "eos_token_id", None)
    listed = own if isinstance(own, list | tuple) else [own]
    return sorted({*Endings(tokenizer).ids, *(int(each) for each in listed if each is not None)})


def end_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The texts of end tokens, as they would be read; none for an id that the tokenizer lacks."""
    added = tokenizer.added_tokens_decoder
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        added[each].content if each in added else str(tokenizer.decode([each]))
        for each, token in zip(ids, tokens, strict=True)
        if token is not None
    ]


def _rendered(tokenizer: Any, messages: list[Message]) -> str | None:
    """What the template writes for messages, or None if it refuses them.

    A template is a program of the user, and may fail in any way.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # noqa: BLE001 - see above
        return None


def _written_around(rendered: str) -> tuple[str, str, str] | None:
    """What the template has written before, between and after a question and an answer.

    None if it did not write both.
    """
    before, asked, rest = rendered.partition(_ASKED)
    between, said, after = rest.partition(_SAID)
    return (before, between, after) if asked and said else None


def _first(text: str, known: Collection[str]) -> str | None:
    """The longest known text with which a text begins."""
    return max((each for each in known if text.startswith(each)), key=len, default=None)


def _last(text: str, known: Collection[str]) -> str | None:
    """The longest known text with which a text ends."""
    if not text.endswith(tuple(known)):
        return None
    return max((each for each in known if text.endswith(each)), key=len)


def _text_of(special: dict[str, int], token_id: int) -> str:
    return next(text for text, each in special.items() if each == token_id)
