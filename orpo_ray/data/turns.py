"""Where the assistant turns of a conversation are in its text and in its tokens.

A turn begins where generation of it would start, and it ends with its end token. Some templates
write a turn in another way if more turns follow, for example without its thoughts. Such a turn
cannot be trained as the model generates it.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from orpo_ray.data.endings import Endings
from orpo_ray.data.pairs import Message, Refusal

_THOUGHT_MARK = re.compile(r"</?(?:think|thinking|reasoning)>")

Render = Callable[[list[Message], bool], str | Refusal]
"""Writes messages by the template, with or without what it writes for generation to start."""
Bounds = tuple[int, int]
"""The first token of a turn, and the one after its end token."""


class Turn(NamedTuple):
    """An assistant turn: its number among the messages, the text before it, its own text, and its
    end token.
    """

    number: int
    before: str
    text: str
    end: int


def find_turns(
    messages: list[Message], whole: str, render: Render, endings: Endings, first: int = 0
) -> list[Turn] | Refusal:
    """The assistant turns from message `first` on, in the rendered conversation `whole`.

    A turn that the model would not generate so is a reason to refuse the conversation.
    """
    turns: list[Turn] = []
    for place, message in enumerate(messages):
        if place < first or message["role"] != "assistant":
            continue
        before = render(messages[:place], True)
        rendered = render(messages[: place + 1], False)
        if isinstance(before, Refusal):
            return before
        if isinstance(rendered, Refusal):
            return rendered
        found = _turn(message, before, rendered, whole, endings)
        if not isinstance(found, str) and is_silent(message, messages[:place], rendered, render):
            found = "the chat template writes nothing of it"
        if isinstance(found, str):
            return Refusal("untrainable-turn", f"message {place + 1}: {found}")
        turns.append(Turn(place + 1, before, *found))
    return turns


def is_silent(turn: Message, before: list[Message], written: str, render: Render) -> bool:
    """Whether a turn has no content, and the template writes nothing else of it, such as calls.

    `written` is the conversation up to this turn, as the template writes it.
    """
    if turn["content"].strip():
        return False
    bare: Message = {"role": turn["role"], "content": turn["content"]}
    return render([*before, bare], False) == written


def _turn(
    message: Message, before: str, rendered: str, whole: str, endings: Endings
) -> tuple[str, int] | str:
    """The text and the end token of the turn that is rendered last, or why it cannot be trained."""
    if not (whole.startswith(before) and rendered.startswith(before)):
        return "the conversation does not go on from where generation of it starts"
    found = endings.split(rendered.removeprefix(before))
    if found is None:
        return "the chat template writes no end token after it"
    text, end = found
    if not text.strip():
        return "it is empty"
    if not holds(text, message["content"]):
        return "the chat template changes it"
    if any(each in text for each in endings.texts):
        return "it contains an end token before its end"
    if not whole.startswith(before + text + endings.text_of(end)):
        return "the chat template changes it if more turns follow"
    return text, end


def turn_bounds(
    turns: Sequence[Turn], before: Iterator[list[int]], ids: list[int]
) -> list[Bounds] | Refusal:
    """Where turns are in the ids of a conversation.

    `before` gives the ids of what precedes each turn, and is read once for each.
    """
    bounds: list[Bounds] = []
    for turn, earlier in list(zip(turns, before, strict=False)):
        start = len(earlier)
        if ids[:start] != earlier:
            told = f"message {turn.number}: its first token is joined with the text before it"
            return Refusal("untrainable-turn", told)
        bounds.append((start, ids.index(turn.end, start) + 1))
    return bounds


def holds(rendered: str, content: str) -> bool:
    """Whether a rendered answer has the whole content, with any space around its thoughts."""
    place = 0
    for part in _THOUGHT_MARK.split(content):
        found = rendered.find(part.strip(), place)
        if found < 0:
            return False
        place = found + len(part.strip())
    return bool(rendered)
