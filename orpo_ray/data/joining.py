"""From the raw values of a row to a pair: one conversation, its system turn, and its answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

from orpo_ray.config.data import Columns
from orpo_ray.data.messages import (
    FIELDS,
    RowRefused,
    answer_messages,
    is_deep,
    prompt_messages,
    refuse_dialogue,
)
from orpo_ray.data.pairs import Context, Message, Pair, Row

_SYSTEMS = ("system", "system_prompt")


@dataclass(frozen=True)
class Sides:
    """Raw values of one row: each is a text, a message or a list of messages.

    The prompt is None if it is inside the answers. `apart` says that the answers are dialogues that
    differ before their last turn.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    apart: bool = False


@dataclass(frozen=True)
class Single:
    """Raw values of one row with one answer, whether its label calls it good, and its column."""

    prompt: Any
    answer: Any
    is_good: bool
    column: str


def to_pair(sides: Sides, system: str, context: Context, all_turns: bool) -> Pair:
    """The pair in three values.

    With `all_turns` the two sides may part at any assistant turn, else at the last. Raises
    RowRefused if there is no pair.
    """
    before_chosen, chosen = answer_messages(sides.chosen, "chosen")
    before_rejected, rejected = answer_messages(sides.rejected, "rejected")
    shared = len(before_chosen)
    if sides.apart or _identity(before_chosen) != _identity(before_rejected):
        answers = [*before_chosen, chosen], [*before_rejected, rejected]
        shared = _shared_turns(*answers, apart=sides.apart, all_turns=all_turns)
    refuse_dialogue(chosen, "chosen")
    refuse_dialogue(rejected, "rejected")
    conversation = _join(prompt_messages(sides.prompt), before_chosen[:shared])
    return Pair(
        prompt=with_system(conversation, system),
        chosen=chosen,
        rejected=rejected,
        context=context,
        before_chosen=before_chosen[shared:],
        before_rejected=before_rejected[shared:],
    )


def _shared_turns(
    chosen: list[Message], rejected: list[Message], *, apart: bool, all_turns: bool
) -> int:
    """With how many equal messages two sides begin that differ before their last turn.

    Refuses them unless they part at an assistant's turn and `all_turns` asks for such pairs.
    """
    where = "the messages before the last answer differ"
    if apart:
        where = 'the dialogues differ before their last "Assistant:"'
    both = zip(_comparable(chosen), _comparable(rejected), strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
    if shared == len(chosen) == len(rejected):
        shared -= 1  # only white space differs
    if not apart and shared == len(chosen) - 1 == len(rejected) - 1:
        return shared  # the same, but for white space in a turn before
    parting = [turns[shared]["role"] for turns in (chosen, rejected) if shared < len(turns)]
    if parting != ["assistant", "assistant"]:
        raise RowRefused("different-prompts", where)
    if not all_turns:
        raise RowRefused("different-prompts", f"{where}; data.train_on=all-assistant reads them")
    return shared


def to_single(single: Single, system: str, context: Context) -> Pair:
    """A pair with one side. Raises RowRefused if there is no prompt or no answer."""
    side = "chosen" if single.is_good else "rejected"
    if single.answer in (None, []):
        raise RowRefused(f"missing-{side}")
    before, answer = answer_messages(single.answer, single.column)
    refuse_dialogue(answer, single.column)
    conversation = _join(prompt_messages(single.prompt), before)
    sides = {"chosen": None, "rejected": None, side: answer}
    return Pair(
        prompt=with_system(conversation, system),
        chosen=sides["chosen"],
        rejected=sides["rejected"],
        context=context,
    )


def context_of(row: Row) -> Context:
    """The row's tools and documents, as a list or as JSON text."""
    asked = row.get("input")
    tools = row.get("tools") or (asked.get("tools") if isinstance(asked, dict) else None)
    found = {"tools": _listed(tools, "tools"), "documents": _listed(row.get("documents"), "")}
    return cast(Context, {name: values for name, values in found.items() if values})


def _listed(value: Any, refused_as: str) -> list[Any] | None:
    """A list of objects. Any other value is refused, or is None if it may mean something else."""
    found = value
    if isinstance(value, str) and value.strip():
        try:
            found = json.loads(value)
        except ValueError:
            found = None
    if isinstance(found, list) and all(isinstance(each, dict) for each in found):
        if is_deep(found):
            raise RowRefused("wrong-type", "tools or documents are nested too deep")
        return found
    if refused_as and value not in (None, ""):
        raise RowRefused("wrong-type", f"{refused_as} holds no list of tools")
    return None


def _join(prompt: list[Message], context: list[Message]) -> list[Message]:
    """One conversation from a prompt column and the messages before the last answer.

    No message is lost and none comes twice.
    """
    if not prompt and not context:
        raise RowRefused("missing-prompt")
    asked, inside = _comparable(prompt), _comparable(context)
    if any(inside[start : start + len(asked)] == asked for start in range(len(inside))):
        return context
    # The answers may repeat the end of the prompt, and may have more turns after it.
    shared = _overlap(asked, inside)
    if shared or not context or context[0]["role"] == "assistant":
        return prompt + context[shared:]
    raise RowRefused("different-prompts", "the prompt is not the one inside the answers")


def _overlap(asked: Sequence[tuple[str, str, str]], inside: Sequence[tuple[str, str, str]]) -> int:
    """The largest number of messages that both end `asked` and start `inside`."""
    for count in range(min(len(asked), len(inside)), 0, -1):
        if asked[-count:] == inside[:count]:
            return count
    return 0


def _identity(messages: list[Message]) -> list[dict[str, Any]]:
    """What tells messages apart; not a number or a date that belongs to one of them."""
    names = {"role", "content", *FIELDS}
    return [
        {name: value for name, value in message.items() if name in names} for message in messages
    ]


def _comparable(messages: list[Message]) -> list[tuple[str, str, str]]:
    return [(message["role"], message["content"].strip(), _fields(message)) for message in messages]


def _fields(message: Message) -> str:
    fields = {name: value for name, value in message.items() if name in FIELDS}
    return json.dumps(fields) if fields else ""


def system_of(row: Row, columns: Columns | None) -> str:
    """The text of a system column; "" if there is none."""
    values = {name: row.get(name) for name in system_columns(columns)}
    texts = {_system_text(value, name) for name, value in values.items() if value}
    if len(texts) > 1:
        raise RowRefused("different-prompts", f"{' and '.join(values)} are not the same")
    return next(iter(texts), "")


def _system_text(value: Any, column: str) -> str:
    """A text, or the only message of role system."""
    if isinstance(value, str):
        return value.strip() and value
    messages = prompt_messages(value)
    if [message["role"] for message in messages] != ["system"]:
        raise RowRefused("wrong-type", f"{column} holds no text")
    return messages[0]["content"]


def system_columns(columns: Columns | None) -> tuple[str, ...]:
    """The columns that may hold the system turn.

    Columns that `columns` uses for prompt, chosen or rejected are left out.
    """
    if columns is None:
        return _SYSTEMS
    if columns.system is not None:
        return (columns.system,)
    return tuple(name for name in _SYSTEMS if name not in columns.named)


def with_system(conversation: list[Message], system: str) -> list[Message]:
    """The conversation after a system turn, which it may have already.

    Raises RowRefused if it has another one.
    """
    if not system:
        return conversation
    if conversation[0]["role"] != "system":
        return [{"role": "system", "content": system}, *conversation]
    if conversation[0]["content"].strip() != system.strip():
        raise RowRefused(
            "different-prompts", "the system column is not the system turn of the conversation"
        )
    return conversation
