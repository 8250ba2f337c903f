"""From a pair to texts: a chat template renders the prompt and each side.

The prompt's text is that from which generation starts, whatever the answer is. Prompt and answer
together are the conversation as the template renders it.
"""

import re
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from jinja2 import TemplateError

from orpo_ray.data.endings import Endings
from orpo_ray.data.marks import texts_of
from orpo_ray.data.messages import THOUGHTS, first_of
from orpo_ray.data.pairs import Context, Message, Pair, Refusal
from orpo_ray.data.template import ChatTemplate
from orpo_ray.data.turns import Render, Turn, find_turns, holds, is_silent

_OPEN, _CLOSED = "<think>", "</think>"
_OPENED_THOUGHTS = re.compile(r"<(think|thinking|reasoning)>\s*$")

_ALWAYS = ("role", "content")
_PRIVATE_USE = (0xF0000, 0xFFFFE)
_ASKED: list[Message] = [{"role": "user", "content": "xAsked"}]
_DATE = datetime(2024, 7, 26, tzinfo=UTC)
_DIRECTIVES = ("-d", "-m", "-H", "-I", *"aAbBcdHIjmMpSuUwWxXyYzZ")
_DATED_TEMPLATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{name}', {_DATE.strftime('%' + name)!r})" for name in _DIRECTIVES)
    + " }}{% endmacro %}\n"
)
"""Goes before a template that asks for today's date.

It adds no text to what the template writes: Jinja drops its line break.
"""


class Answer(NamedTuple):
    """The text of an answer without its end token, and that token."""

    text: str
    end: int
    turns: list[Turn]


class Prompt(NamedTuple):
    """The text from which generation starts, and whether it was rendered before."""

    text: str
    rendered_before: bool


class Rendered(NamedTuple):
    """Texts of one pair. The prompt ends where generation starts.

    The turns are those of the prompt, if they are trained.
    """

    prompt: str
    answers: dict[str, Answer]
    turns: list[Turn]


class Renderer:
    """Applies the chat template of one tokenizer to pairs.

    With `all_turns` the earlier assistant turns are trained, too.
    """

    def __init__(self, tokenizer: Any, *, all_turns: bool = False) -> None:
        self._tokenizer = tokenizer
        self._all_turns = all_turns
        is_dated = fixed_date(tokenizer) is not None
        self._template = ChatTemplate(
            tokenizer, _DATED_TEMPLATE + tokenizer.get_chat_template() if is_dated else None
        )
        self.endings = Endings(tokenizer)
        self._opening = self._finds_opening()
        self._puts_thoughts_back = _OPENED_THOUGHTS.search(self._opening) is not None

    def ignored_fields(self, pair: Pair) -> list[str]:
        """The fields of a pair that make no difference to what the template writes."""
        said = [turn for turns in pair.answers.values() for turn in turns]
        messages = (*pair.prompt, *said)
        fields = {name for message in messages for name in message if name not in _ALWAYS}
        names = sorted(fields | pair.context.keys())
        if self._puts_thoughts_back:
            of_answers = {name for turns in pair.answers.values() for name in turns[-1]}
            names = [name for name in names if not (name in THOUGHTS and name in of_answers)]
        if not names:
            return []  # most pairs: nothing is rendered again
        written = self._written(pair)
        return [name for name in names if self._written(_without_field(pair, name)) == written]

    def _written(self, pair: Pair) -> list[str | Refusal]:
        return [
            self._render([*pair.prompt, *turns], pair.context, generation=False)
            for turns in pair.answers.values()
        ]

    def _render(self, messages: list[Message], context: Context, generation: bool) -> str | Refusal:
        try:
            return self._template.write(messages, context, generation)
        except TemplateError as error:
            return Refusal("template-refused", str(error))
        except Exception as error:  # noqa: BLE001 - a template is a program of the user
            return Refusal("template-refused", f"{type(error).__name__}: {error}")

    def prompt(self, messages: list[Message], context: Context) -> Prompt | Refusal:
        """The text from which generation starts.

        A text that this template has rendered already is not rendered again.
        """
        marked = self._mark_in(*self._without_start(messages))
        marked = marked or self.endings.in_text.first_of(context)
        if marked is None:
            text = self._render(messages, context, generation=True)
            return text if isinstance(text, Refusal) else Prompt(text, rendered_before=False)
        if len(messages) == 1 and messages[0]["role"] == "user" and not context:
            text, opening = messages[0]["content"].rstrip(), self._opening.rstrip()
            if opening and text.endswith(opening):
                text = self.endings.as_written(text.removesuffix(opening) + self._opening)
                return text if isinstance(text, Refusal) else Prompt(text, rendered_before=True)
        return Refusal("template-inside", f"the prompt has {marked}")

    def without_marks(self, generated: list[Message], sign: str) -> list[Message]:
        """Generated turns, with a sign inside each mark that an answer of the model spells."""
        return [
            {**message, "content": self.endings.in_text.split_by(sign, message["content"])}
            if message["role"] == "assistant"
            else message
            for message in generated
        ]

    def _without_start(self, messages: list[Message]) -> list[Message]:
        """The messages without a start token at the start: it counts once if nothing precedes it.

        A template's own mark before it would make it a start inside a text.
        """
        if not messages or not self.endings.begins_with_text:
            return messages
        content = self.endings.without_start(messages[0]["content"])
        return [{**messages[0], "content": content}, *messages[1:]]

    def _mark_in(self, *messages: Message) -> str | None:
        """The first mark in any text of messages, be it their content or another field."""
        for message in messages:
            spoken = message["role"] == "assistant"
            marks = self.endings.in_answer if spoken else self.endings.in_text
            if marked := marks.first_of(message):
                return marked
        return None

    def pair(self, pair: Pair) -> Rendered | Refusal:
        """The texts of a pair, or why there are none."""
        if pair.multi_turn:
            pair = replace(pair, prompt=[self._without_end(turn) for turn in pair.prompt])
        prompt = self.prompt(pair.prompt, pair.context)
        if isinstance(prompt, Refusal):
            return prompt
        answers = {}
        for side, said in pair.answers.items():
            found = self._render_side(pair, prompt, said, side)
            if isinstance(found, Refusal):
                return found
            answers[side] = found
        turns = self._turns(pair.prompt, prompt.text, pair.context) if self._all_turns else []
        return turns if isinstance(turns, Refusal) else Rendered(prompt.text, answers, turns)

    def _render_side(
        self, pair: Pair, prompt: Prompt, turns: list[Message], side: str
    ) -> Answer | Refusal:
        """What follows the prompt: the text that generation should write, or several turns."""
        if len(turns) == 1:
            return self._render_answer(pair, prompt, turns[0], side)
        if prompt.rendered_before:
            return Refusal(
                "template-inside", f"the prompt is rendered, but {side} is several turns"
            )
        said = [self._without_end(turn) for turn in turns]
        if marked := self._mark_in(*said):
            return Refusal("template-inside", f"{side} has {marked}")
        conversation = [*pair.prompt, *said]
        whole = self._render(conversation, pair.context, generation=False)
        if isinstance(whole, Refusal):
            return whole
        found = self._turns(conversation, whole, pair.context, first=len(pair.prompt))
        if isinstance(found, Refusal):
            return found
        last = found[-1]
        return Answer((last.before + last.text).removeprefix(prompt.text), last.end, found)

    def _turns(
        self, messages: list[Message], whole: str, context: Context, first: int = 0
    ) -> list[Turn] | Refusal:
        """The assistant turns from message `first` on in a rendered conversation."""
        return find_turns(messages, whole, self._with(context), self.endings, first)

    def _with(self, context: Context) -> Render:
        """Writes messages of a row with this context."""
        return lambda messages, generation: self._render(messages, context, generation)

    def _without_end(self, turn: Message) -> Message:
        if turn["role"] != "assistant":
            return turn
        return {**turn, "content": self.endings.without_end(turn["content"])}

    def _render_answer(
        self, pair: Pair, prompt: Prompt, answer: Message, side: str
    ) -> Answer | Refusal:
        """What generation should write after the prompt."""
        messages, start = pair.prompt, prompt.text
        content = self.endings.without_end(answer["content"])
        if prompt.rendered_before:
            # The prompt is rendered already, and an answer may begin with it once more.
            content = content.removeprefix(messages[-1]["content"])
            messages = _ASKED
            start = str(self._render(messages, {}, generation=True))
        else:
            content = content.removeprefix(start)
        if not content.strip() and not answer.get("tool_calls"):
            return Refusal(f"empty-{side}", "nothing but the end token")
        said: Message = {**answer, "content": content}
        if marked := self._mark_in(said):
            if marked in self.endings.texts:
                return Refusal("end-token-inside", side)
            return Refusal("template-inside", f"{side} has {marked}")
        whole = self._render([*messages, said], pair.context, generation=False)
        if isinstance(whole, Refusal):
            return whole
        rest = whole.removeprefix(start)
        if rest == whole:
            rest = _with_thoughts(whole, start, said)
        elif rest.count(_CLOSED) > content.count(_CLOSED) and (apart := _thoughts_apart(said)):
            # The template writes a block of thoughts of its own, so those of the content go there.
            found = self._render_answer(pair, prompt, apart, side)
            if isinstance(found, Answer) and not holds(found.text, apart["reasoning_content"]):
                return Refusal("template-rewrites")
            return found
        if not holds(rest, content):
            return Refusal("template-rewrites")
        parts = self.endings.split(rest)
        if parts is None:
            return Refusal("no-end-token", side)
        if is_silent(said, messages, whole, self._with(pair.context)):
            return Refusal(f"empty-{side}", "the chat template does not write its tool_calls")
        return Answer(*parts, turns=[])

    def _finds_opening(self) -> str:
        """What the template writes last before generation; "" if nothing can be told.

        Some write nothing for generation to start (Mistral). Then it is the end of the user's turn.
        """
        asked = self._render(_ASKED, {}, generation=False)
        opened = self._render(_ASKED, {}, generation=True)
        if isinstance(asked, Refusal) or isinstance(opened, Refusal):
            return ""
        if opened == asked:
            return opened.rpartition(_ASKED[0]["content"])[2].lstrip()
        if not opened.startswith(asked):
            # Phi-3's writes eos_token after a conversation, even if an answer is to come.
            asked = asked.removesuffix(self._tokenizer.eos_token)
        return opened.removeprefix(asked) if opened.startswith(asked) else ""


def _thoughts_apart(answer: Message) -> Message | None:
    """The answer with the thoughts that its content begins with in a field; None without any."""
    thoughts, closed, content = answer["content"].partition(_CLOSED)
    thoughts = thoughts.lstrip().removeprefix(_OPEN)
    if not closed or _OPEN in thoughts or first_of(dict(answer), THOUGHTS):
        return None
    return {**answer, "content": content.lstrip(), "reasoning_content": thoughts.strip()}


def _with_thoughts(whole: str, start: str, answer: Message) -> str:
    """What generation should write if its prompt opens a block of thoughts; "" if nothing can be.

    Such templates (DeepSeek R1) write `<think>` for generation only, and drop the thoughts of an
    answer. They are put back: those of the row, or none. The block is closed either way.
    """
    opened = _OPENED_THOUGHTS.search(start)
    if opened is None or not whole.startswith(start[: opened.start()]):
        return ""
    said = whole.removeprefix(start[: opened.start()])
    opening, closing = f"<{opened[1]}>", f"</{opened[1]}>"
    if closing in said:
        return said.removeprefix(opening).lstrip()
    thoughts, closed, _ = answer["content"].rpartition(closing)
    thoughts = thoughts.lstrip().removeprefix(opening)
    if closed and opening not in thoughts:  # else an answer without thoughts speaks of both marks
        return thoughts.lstrip() + closing + said
    thoughts = str(first_of(dict(answer), THOUGHTS) or "")
    return f"{thoughts.strip()}\n{closing}\n\n{said}"


def _without_field(pair: Pair, name: str) -> Pair:
    def without(values: Any) -> Any:
        return values and {key: value for key, value in values.items() if key != name}

    return Pair(
        prompt=[without(message) for message in pair.prompt],
        chosen=without(pair.chosen),
        rejected=without(pair.rejected),
        context=without(pair.context),
        before_chosen=[without(message) for message in pair.before_chosen],
        before_rejected=[without(message) for message in pair.before_rejected],
    )


def unused_sign(messages: list[Message]) -> str:
    """A character for private use that no text of a conversation has."""
    used = set("".join(texts_of(messages)))
    return next(sign for sign in map(chr, range(*_PRIVATE_USE)) if sign not in used)


def fixed_date(tokenizer: Any) -> str | None:
    """The date for a chat template that asks for today's, else None.

    It is always the same one, so that tokens are the same every day.
    """
    return f"{_DATE:%Y-%m-%d}" if "strftime_now" in str(tokenizer.chat_template) else None
