"""The shapes that preference files have, in one table, and how a row of each becomes a pair."""

import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

from orpo_ray.config.data import Columns
from orpo_ray.data.pairs import Message, Pair, Refusal, Row

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
_ROLE_KEYS = ("role", "from")
_TEXT_KEYS = ("content", "value", "text")

_PROMPTS = ("prompt", "question", "request", "query", "context", "instruction", "input")
_CONVERSATIONS = ("conversations", "conversation", "messages")
_SIDES = (
    ("chosen", "rejected"),
    ("chosen", "reject"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("preferred", "dispreferred"),
)
_OUTPUTS = (("output_1", "output_2"), ("response_1", "response_2"), ("answer_1", "answer_2"))
_IMAGES = ("images", "image", "image_url", "video", "videos", "audio", "audios")
_SYSTEMS = ("system", "system_prompt")
_LABELS = ("label", "preference")
_ALPACA = ("input", "history")
_ALL_PROMPTS = frozenset({*_PROMPTS, *_CONVERSATIONS})
_ONE_ANSWER = frozenset({"completion", "response", "output", "answer", *_CONVERSATIONS})
_KEYS_OF_SIDE_TABLES = frozenset({"id", "idx", "index", "prompt_id", "uid", "source", "category"})

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class _RowRefused(Exception):  # noqa: N818 - it is caught in this file
    def __init__(self, code: str, detail: str = "") -> None:
        self.refusal = Refusal(code, detail)


@dataclass(frozen=True)
class _Sides:
    """Raw values of one row: each is a text, a message or a list of messages.

    The prompt is None if it is inside the answers.
    """

    prompt: Any
    chosen: Any
    rejected: Any


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One shape of rows, recognised by its columns.

    A row has this shape if it has both columns of one pair of `sides`, and one of the columns in
    `prompt`. A shape with an empty `prompt` needs no such column. `read` takes the row and the
    names of its prompt, chosen and rejected column. It returns the three values, or None if the
    values show that the row has a shape that comes later in `SHAPES`.
    """

    name: str
    prompt: tuple[str, ...]
    sides: tuple[tuple[str, str], ...]
    read: Callable[[Row, str, str, str], _Sides | None]
    also: tuple[str, ...] = ()
    """Other columns that `read` uses."""


def read_pair(row: Row, columns: Columns | None = None) -> Pair | Refusal:
    """The pair in a row, or why there is none.

    `columns` names the columns of a file whose shape is not in `SHAPES`.
    """
    try:
        _refuse_images(row)
        return _to_pair(_find_sides(row, columns)[0], _system(row, columns))
    except _RowRefused as refused:
        return refused.refusal


def used_columns(row: Row, columns: Columns | None = None) -> set[str]:
    """The columns that a row's pair is read from; none if the row holds no pair."""
    try:
        _, used = _find_sides(row, columns)
    except _RowRefused:
        return set()
    return {*used, *_system_columns(columns)}


def _find_sides(row: Row, columns: Columns | None) -> tuple[_Sides, tuple[str, ...]]:
    """The three values, and the columns that they come from."""
    if columns is not None:
        named = (columns.prompt, columns.chosen, columns.rejected)
        missing = [name for name in named if name not in row]
        if not missing:
            _refuse_missing_system(row, columns)
            return _Sides(*(row[name] for name in named)), named
        # A second source, often `eval`, may have another shape: it lacks all of these columns.
        # A row that has some of them is a sign of a spelling mistake.
        if len(missing) < len(named):
            raise _RowRefused("missing-column", f"{', '.join(missing)} is not among {_names(row)}")
    present = {name for name, value in row.items() if value is not None}
    for shape in SHAPES:
        sides = next((pair for pair in shape.sides if present.issuperset(pair)), None)
        if sides is None:
            continue
        prompt = _find_prompt(present, shape)
        if prompt is None:
            continue
        found = shape.read(row, prompt, *sides)
        if found is not None:
            return found, (prompt, *sides, *shape.also)
    raise _RowRefused(*_why_no_shape(row, present))


def _refuse_missing_system(row: Row, columns: Columns) -> None:
    if columns.system is not None and columns.system not in row:
        raise _RowRefused("missing-column", f"{columns.system} is not among {_names(row)}")


def _find_prompt(present: Set[str], shape: Shape) -> str | None:
    """The prompt's column, "" for a shape without one, or None if the row does not match."""
    if not shape.prompt:
        return ""
    found = [name for name in shape.prompt if name in present]
    if len(found) > 1 and found[0] not in ("prompt", "instruction"):
        raise _RowRefused("unknown-shape", f"{' and '.join(found)} could each be the prompt")
    return found[0] if found else None


def _why_no_shape(row: Row, present: Set[str]) -> tuple[str, str]:
    """Why a row holds no pair, as code and detail.

    "unknown-shape" is the last answer: other reasons tell the user more.
    """
    if isinstance(row.get("label"), bool) or ("label" in present and present & _ONE_ANSWER):
        return "unpaired", ""
    for chosen, rejected in _SIDES:
        if chosen in row and rejected in row:
            return ("missing-rejected" if chosen in present else "missing-chosen"), ""
    for chosen, rejected in _SIDES:
        if chosen in present:
            return "missing-rejected", f"found {_names(row)}"
        if rejected in present:
            return "missing-chosen", f"found {_names(row)}"
    if present & _ALL_PROMPTS and present - _ALL_PROMPTS <= _KEYS_OF_SIDE_TABLES:
        return "prompts-only", ""
    return "unknown-shape", f"found {_names(row)}"


def _refuse_images(row: Row) -> None:
    found = [name for name in _IMAGES if row.get(name)]
    if found:
        raise _RowRefused("images", f"column {found[0]}")


def _names(row: Row) -> str:
    return "columns " + ", ".join(list(row)[:12]) if row else "no columns"


# --- reading the three values of each shape -------------------------------------------------------


def _read_explicit(row: Row, prompt: str, chosen: str, rejected: str) -> _Sides:
    return _Sides(row[prompt], row[chosen], row[rejected])


def _read_alpaca(row: Row, prompt: str, chosen: str, rejected: str) -> _Sides:
    instruction, extra = _text(row[prompt], prompt), _text(row.get("input") or "", "input")
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    history = row.get("history") or []
    if not history:
        return _Sides(question, row[chosen], row[rejected])
    try:
        earlier = []
        for asked, answered in history:
            earlier.append({"role": "user", "content": asked})
            earlier.append({"role": "assistant", "content": answered})
    except (TypeError, ValueError) as error:
        raise _RowRefused(
            "wrong-type", "history is not a list of question and answer pairs"
        ) from error
    return _Sides([*earlier, {"role": "user", "content": question}], row[chosen], row[rejected])


def _read_openai(row: Row, prompt: str, chosen: str, rejected: str) -> _Sides:
    value = row[prompt]
    messages = value.get("messages") if isinstance(value, dict) else value
    return _Sides(messages, row[chosen], row[rejected])


def _read_labelled(row: Row, prompt: str, first: str, second: str) -> _Sides:
    label = next((row[name] for name in _LABELS if name in row), None)
    if isinstance(label, bool) or str(label).strip() not in ("1", "2"):
        raise _RowRefused("wrong-label", f"label {label!r}")
    better, worse = (first, second) if str(label).strip() == "1" else (second, first)
    read = _read_alpaca if prompt == "instruction" else _read_explicit
    return read(row, prompt, better, worse)


def _read_implicit(row: Row, prompt: str, chosen: str, rejected: str) -> _Sides | None:
    better, worse = row[chosen], row[rejected]
    texts = isinstance(better, str) and isinstance(worse, str)
    if texts and _HUMAN in "\n\n" + better.lstrip() and _HUMAN in "\n\n" + worse.lstrip():
        return _split_dialogues(better, worse)
    conversations = any(isinstance(side, list) and len(side) > 1 for side in (better, worse))
    if row.get("messages") is not None and not conversations:
        return None
    if texts and not row.keys() & _ALL_PROMPTS:
        code = "prompt-elsewhere" if "prompt_id" in row else "unknown-shape"
        raise _RowRefused(code, f"found {_names(row)}")
    return _Sides(None, better, worse)


SHAPES = (
    Shape(
        name="two outputs and a label",
        prompt=_PROMPTS,
        sides=_OUTPUTS,
        read=_read_labelled,
        also=(*_LABELS, *_ALPACA),
    ),
    Shape(
        name="OpenAI preference",
        prompt=("input",),
        sides=(("preferred_output", "non_preferred_output"),),
        read=_read_openai,
    ),
    Shape(
        name="ShareGPT conversations",
        prompt=("conversations", "conversation"),
        sides=_SIDES,
        read=_read_explicit,
    ),
    Shape(
        name="Alpaca instruction",
        prompt=("instruction",),
        sides=_SIDES,
        read=_read_alpaca,
        also=_ALPACA,
    ),
    Shape(name="prompt and two answers", prompt=_PROMPTS, sides=_SIDES, read=_read_explicit),
    Shape(name="prompt inside the answers", prompt=(), sides=_SIDES, read=_read_implicit),
    Shape(name="messages and two answers", prompt=("messages",), sides=_SIDES, read=_read_explicit),
)


# --- Anthropic HH dialogues -----------------------------------------------------------------------


def _split_dialogues(chosen: str, rejected: str) -> _Sides:
    """Cut both dialogues at their last `Assistant:` into prompt and answer."""
    (prompt, better), (other, worse) = _cut_dialogue(chosen), _cut_dialogue(rejected)
    if prompt.strip() != other.strip():
        raise _RowRefused(
            "different-prompts", 'the dialogues differ before their last "Assistant:"'
        )
    return _Sides(_read_dialogue(prompt), better, worse)


def _cut_dialogue(text: str) -> tuple[str, str]:
    text = "\n\n" + text.lstrip()
    prompt, marker, answer = text.rpartition(_ASSISTANT)
    if not marker or _HUMAN in answer:
        raise _RowRefused("wrong-roles", "the dialogue does not end with an Assistant turn")
    return prompt, answer.strip()


def _read_dialogue(text: str) -> list[Message]:
    """The turns of a dialogue.

    Consecutive turns of one speaker are joined: the second "Human:" was typed inside a turn.
    """
    before, *parts = _HH_TURN.split(text)
    turns: list[Message] = [{"role": "system", "content": before.strip()}] if before.strip() else []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1]["role"] == role:
            turns[-1] = {"role": role, "content": f"{turns[-1]['content']}\n\n{said.strip()}"}
        else:
            turns.append({"role": role, "content": said.strip()})
    return turns


# --- from raw values to messages ------------------------------------------------------------------


def _to_pair(sides: _Sides, system: str) -> Pair:
    before_chosen, chosen = _answer(sides.chosen, "chosen")
    before_rejected, rejected = _answer(sides.rejected, "rejected")
    if before_chosen != before_rejected:
        raise _RowRefused("different-prompts", "the messages before the last answer differ")
    conversation = _join(_prompt(sides.prompt), before_chosen)
    return Pair(_with_system(conversation, system), chosen, rejected)


def _join(prompt: list[Message], context: list[Message]) -> list[Message]:
    """One conversation from a prompt column and the messages before the last answer.

    No message is lost and none comes twice.
    """
    if not prompt and not context:
        raise _RowRefused("missing-prompt")
    asked, inside = _comparable(prompt), _comparable(context)
    if any(inside[start : start + len(asked)] == asked for start in range(len(inside))):
        return context
    # The answers may repeat the end of the prompt, and may have more turns after it.
    shared = _overlap(asked, inside)
    if shared or not context or context[0]["role"] == "assistant":
        return prompt + context[shared:]
    raise _RowRefused("different-prompts", "the prompt is not the one inside the answers")


def _overlap(asked: Sequence[tuple[str, str]], inside: Sequence[tuple[str, str]]) -> int:
    """The largest number of messages that both end `asked` and start `inside`."""
    for count in range(min(len(asked), len(inside)), 0, -1):
        if asked[-count:] == inside[:count]:
            return count
    return 0


def _comparable(messages: list[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def _system(row: Row, columns: Columns | None) -> str:
    """The text of a system column; "" if there is none."""
    values = (row.get(name) for name in _system_columns(columns))
    return next((value for value in values if isinstance(value, str) and value.strip()), "")


def _system_columns(columns: Columns | None) -> tuple[str, ...]:
    """The columns that may hold the system turn.

    Columns that `columns` uses for prompt, chosen or rejected are left out.
    """
    if columns is None:
        return _SYSTEMS
    if columns.system is not None:
        return (columns.system,)
    named = (columns.prompt, columns.chosen, columns.rejected)
    return tuple(name for name in _SYSTEMS if name not in named)


def _with_system(conversation: list[Message], system: str) -> list[Message]:
    if not system:
        return conversation
    if conversation[0]["role"] != "system":
        return [{"role": "system", "content": system}, *conversation]
    if conversation[0]["content"].strip() != system.strip():
        raise _RowRefused(
            "different-prompts", "the system column is not the system turn of the conversation"
        )
    return conversation


def _prompt(value: Any) -> list[Message]:
    if value is None:
        return []
    if isinstance(value, str):
        dialogue = "\n\n" + value.strip()
        if _HUMAN in dialogue and dialogue.endswith(_ASSISTANT):
            return _read_dialogue(dialogue.removesuffix(_ASSISTANT))
        return [{"role": "user", "content": value}]
    return _messages(value, "prompt")


def _answer(value: Any, side: str) -> tuple[list[Message], str]:
    """The messages before the last answer, and that answer."""
    if value is None or value == []:
        raise _RowRefused(f"missing-{side}")
    if isinstance(value, str):
        return [], value
    messages = _messages(value, side)
    if messages[-1]["role"] != "assistant":
        raise _RowRefused(
            "wrong-roles", f"{side} ends with a turn of role {messages[-1]['role']!r}"
        )
    return messages[:-1], messages[-1]["content"]


def _messages(value: Any, column: str) -> list[Message]:
    values = value if isinstance(value, list) else [value]
    return [
        _message(item, column, "user" if column == "prompt" else "assistant") for item in values
    ]


def _message(value: Any, column: str, default_role: str) -> Message:
    if not isinstance(value, dict):
        raise _RowRefused(
            "wrong-type", f"{column} holds {type(value).__name__}, not text or messages"
        )
    name = next((value[key] for key in _ROLE_KEYS if value.get(key) is not None), default_role)
    role = ROLES.get(str(name).lower())
    if role is None:
        raise _RowRefused("wrong-roles", f"role {str(name)!r} in {column}")
    content = next((value[key] for key in _TEXT_KEYS if value.get(key) is not None), None)
    return {"role": role, "content": _text(content, column)}


def _text(value: Any, column: str) -> str:
    """The text of a value, which may be a list of text parts, as multimodal chats write it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        for part in value:
            if part.get("type", "text") != "text":
                raise _RowRefused("images", f"{column} has a part of type {part['type']!r}")
        return "".join(_text(part.get("text"), column) for part in value)
    raise _RowRefused("wrong-type", f"{column} holds {type(value).__name__}, not text")
