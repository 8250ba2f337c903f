"""Messages that were kept as text, as CSV files and databases do."""

import ast
import json
import re
from typing import Any

from orpo_ray.data.messages import ROLE_KEYS, ROLES, TEXT_KEYS, RowRefused, first_of

_BEGINNINGS = ("[", "{", '"', "a")
"""What messages as text begin with. Most texts do not, and are not searched."""
_OBJECTS = re.compile(r"\s*\[?\s*\{")
_ROLE = re.compile(
    rf"""\\?['"](role|from)\\?['"]\s*:\s*\\?['"]({"|".join(ROLES)})\\?['"]""", re.IGNORECASE
)
_STARTS_TEXT = re.compile(r'\s*"\s*[\[{]')
_STARTS_ARRAY = re.compile(r"\s*array\(\s*\[")
_CALLS = ("tool_calls", "function_call")


def unpacked(value: Any, column: str) -> Any:
    """Messages that were kept as JSON text; else the value itself.

    Python's own notation is read, too. Raises RowRefused for messages in any other notation.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in _BEGINNINGS:
        return value
    if not _ROLE.search(value):
        return value
    if _STARTS_ARRAY.match(value):
        raise RowRefused("messages-as-text", f"{column}, as an array of numpy")
    if _STARTS_TEXT.match(value):
        inner = _read(value)  # JSON text of JSON text
        return unpacked(inner, column) if isinstance(inner, str) else value
    if not _OBJECTS.match(value):
        return value
    found = _read(value)
    if found is None and value.lstrip().startswith("["):
        raise RowRefused("messages-as-text", column)
    return found if _are_messages(found) else value


def _read(value: str) -> Any:
    """The value of a text, or None. A line break inside of a text counts as one."""
    for read in (lambda text: json.loads(text, strict=False), ast.literal_eval):
        try:
            return read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _are_messages(value: Any) -> bool:
    """Whether a value is a conversation or a message, and not an answer that is JSON.

    One role that we know is enough: another one is refused by its name.
    """
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return _are_messages(value["messages"])
    messages = value if isinstance(value, list) else [value]
    if not messages or not all(map(_is_message, messages)):
        return False
    return any(first_of(message, ROLE_KEYS).lower() in ROLES for message in messages)


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(first_of(value, ROLE_KEYS), str):
        return False
    return first_of(value, (*TEXT_KEYS, *_CALLS)) is not None
