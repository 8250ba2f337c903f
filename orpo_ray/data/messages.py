"""From the raw values of a row to messages: roles, content parts and dialogues.

A message keeps every field that chat templates write: tool calls, reasoning, names.
"""

import json
import re
from typing import Any, cast

from orpo_ray.data.pairs import Message, Refusal

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
FIELDS = ("tool_calls", "tool_call_id", "name", *THOUGHTS)
"""What templates write of a message besides its content."""

_CALL = "function_call"
_IMAGES = ("images", "image", "image_url", "video", "videos", "audio", "audios")
_DEEPEST = 100
ROLE_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value", "text", "parts")
_OWN = frozenset({*ROLE_KEYS, *TEXT_KEYS})
_TEXT_PARTS = ("text", "input_text", "output_text")
_THINKING_PARTS = ("thinking", "reasoning")

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class RowRefused(Exception):  # noqa: N818 - `formats.read_pairs` catches it
    """Why a row holds no pair."""

    def __init__(self, code: str, detail: str = "") -> None:
        self.refusal = Refusal(code, detail)


def prompt_messages(value: Any) -> list[Message]:
    """The messages of a prompt, which is a text, a dialogue or a list of messages."""
    if value is None:
        return []
    if isinstance(value, str):
        dialogue = "\n\n" + value.strip()
        ends = dialogue.endswith(_ASSISTANT)
        if (ends and _HUMAN in dialogue) or (
            dialogue.startswith(_HUMAN) and (value.startswith("\n\n") or _ASSISTANT in dialogue)
        ):
            return _dialogue_turns(dialogue.removesuffix(_ASSISTANT))
        return [{"role": "user", "content": value}]
    return _messages(value, "prompt")


def answer_messages(value: Any, side: str) -> tuple[list[Message], Message]:
    """The messages before the last answer, and that answer."""
    if value is None or value == []:
        raise RowRefused(f"missing-{side}")
    messages = _messages({"content": value} if isinstance(value, str) else value, side)
    if messages[-1]["role"] != "assistant":
        raise RowRefused("wrong-roles", f"{side} ends with a turn of role {messages[-1]['role']!r}")
    answer = messages[-1]
    if answer["content"].startswith(_ASSISTANT):
        answer = {**answer, "content": answer["content"].removeprefix(_ASSISTANT).strip()}
    return messages[:-1], answer


def refuse_dialogue(answer: Message, side: str) -> None:
    """Raise RowRefused if an answer goes on with what a human says."""
    if _HUMAN in answer["content"]:
        raise RowRefused("dialogue-inside", side)


def text_of(value: Any, column: str) -> str:
    """The text of a value, which may be a list of text parts, as multimodal chats write it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        for part in value:
            if part.get("type", "text") not in _TEXT_PARTS:
                raise RowRefused("images", f"{column} has a part of type {part['type']!r}")
        return "".join(text_of(part.get("text"), column) for part in value)
    raise RowRefused("wrong-type", f"{column} holds {type(value).__name__}, not text")


# --- one message ----------------------------------------------------------------------------------


def _messages(value: Any, column: str) -> list[Message]:
    values = value if isinstance(value, list) else [value]
    return [
        _message(item, column, "user" if column == "prompt" else "assistant") for item in values
    ]


def _message(value: Any, column: str, default_role: str) -> Message:
    if not isinstance(value, dict):
        raise RowRefused(
            "wrong-type", f"{column} holds {type(value).__name__}, not text or messages"
        )
    refuse_images(value)
    name = str(first_of(value, ROLE_KEYS) or default_role)
    role = ROLES.get(name.lower())
    if role is None:
        raise RowRefused("wrong-roles", f"role {name!r} in {column}")
    content = first_of(value, TEXT_KEYS)
    if name.lower() == _CALL:
        return {"role": role, "content": "", "tool_calls": _tool_calls(content, column)}
    fields = {key: each for key, each in value.items() if key not in _OWN and _says(each)}
    if called := fields.pop(_CALL, None):  # what OpenAI had before tools
        fields = {"tool_calls": _tool_calls(called, column), **fields}
    if fields and is_deep(fields):
        raise RowRefused("wrong-type", f"{column} is nested too deep")
    content, thoughts = _without_thoughts(content, column)
    if thoughts:
        fields = {"reasoning_content": thoughts, **fields}
    if content is None and not fields.keys().isdisjoint(FIELDS):
        content = ""  # as messages are written that only call tools
    return cast(Message, {"role": role, "content": text_of(content, column), **fields})


def _says(value: Any) -> bool:
    return value not in (None, "", [], {})


def refuse_images(value: dict[str, Any]) -> None:
    """Raise RowRefused if a row or a message has a column of images, sound or films."""
    if value.keys().isdisjoint(_IMAGES):
        return  # most rows: nothing is looked up
    found = [name for name in _IMAGES if value.get(name)]
    if found:
        raise RowRefused("images", f"column {found[0]}")


def is_deep(value: Any, room: int = _DEEPEST) -> bool:
    """Whether lists and objects are nested too deep to be rendered."""
    inside: Any = ()
    if isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, list):
        inside = value
    return room == 0 or any(is_deep(each, room - 1) for each in inside)


def _without_thoughts(content: Any, column: str) -> tuple[Any, str]:
    """The content without its parts of type thinking, and the text of these parts."""
    if not isinstance(content, list):
        return content, ""
    thoughts = [
        part for part in content if isinstance(part, dict) and part.get("type") in _THINKING_PARTS
    ]
    said = [part for part in content if part not in thoughts]
    texts = (first_of(part, (part["type"], "text")) for part in thoughts)
    return (said or None) if thoughts else content, "".join(text_of(t, column) for t in texts)


def _tool_calls(value: Any, column: str) -> list[dict[str, Any]]:
    """The calls in a ShareGPT turn of function_call: one call or a list of calls, as JSON text."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
        calls = found if isinstance(found, list) else [found]
        return [
            {
                "type": "function",
                "function": {"name": call["name"], "arguments": call.get("arguments", {})},
            }
            for call in calls
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RowRefused("wrong-type", f"{column} has a function_call without a name") from error


def first_of(value: dict[str, Any], keys: tuple[str, ...]) -> Any:
    """The first of the values with these keys that is not null, else None."""
    return next((value[key] for key in keys if value.get(key) is not None), None)


# --- Anthropic HH dialogues -----------------------------------------------------------------------


def has_dialogue(value: Any) -> bool:
    """Whether a text has a turn of HH's `Human:` in it."""
    return isinstance(value, str) and _HUMAN in "\n\n" + value.lstrip()


def starts_dialogue(value: Any) -> bool:
    """Whether a text is a whole HH dialogue."""
    return isinstance(value, str) and value.lstrip().startswith(_HUMAN.lstrip())


def split_dialogues(chosen: str, rejected: str) -> tuple[list[Message], list[Message], bool]:
    """The turns of both dialogues, and whether they differ before their last `Assistant:`."""
    (prompt, better), (other, worse) = _cut_dialogue(chosen), _cut_dialogue(rejected)
    if prompt.strip() != other.strip():
        return _dialogue_turns(chosen), _dialogue_turns(rejected), True
    turns = _dialogue_turns(prompt)
    good: Message = {"role": "assistant", "content": better}
    bad: Message = {"role": "assistant", "content": worse}
    return [*turns, good], [*turns, bad], False


def _cut_dialogue(text: str) -> tuple[str, str]:
    text = "\n\n" + text.lstrip()
    prompt, marker, answer = text.rpartition(_ASSISTANT)
    if not marker or _HUMAN in answer:
        raise RowRefused("wrong-roles", "the dialogue does not end with an Assistant turn")
    return prompt, answer.strip()


def _dialogue_turns(text: str) -> list[Message]:
    """The turns of a dialogue.

    Consecutive turns of one speaker are joined: the second "Human:" was typed inside a turn.
    """
    before, *parts = _HH_TURN.split("\n\n" + text.lstrip())
    turns: list[Message] = [{"role": "system", "content": before.strip()}] if before.strip() else []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1]["role"] == role:
            turns[-1] = {"role": role, "content": f"{turns[-1]['content']}\n\n{said.strip()}"}
        else:
            turns.append({"role": role, "content": said.strip()})
    return turns
