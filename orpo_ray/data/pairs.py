"""What a row becomes: a pair of messages, a refusal, or a pair of token ids."""

from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
Row = dict[str, Any]


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user, assistant or tool.

    The other fields are there only if the row has them. Templates may write them.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[Any]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    thinking: NotRequired[str]


class Context(TypedDict, total=False):
    """What templates write of a row besides its messages."""

    tools: list[Any]
    documents: list[Any]


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt that ends with a user's or a tool's turn, and a better and a worse answer to it."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    context: Context = field(default_factory=Context)

    @property
    def multi_turn(self) -> bool:
        """Whether the prompt holds earlier assistant turns, which are not trained."""
        return any(message["role"] == "assistant" for message in self.prompt)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a row is not used: a code of `checks.REASONS`, and what exactly was found."""

    code: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class TokenPair:
    """Token ids of one pair; each answer ends with exactly one end token."""

    pair_id: str
    prompt: IntArray
    chosen: IntArray
    rejected: IntArray
