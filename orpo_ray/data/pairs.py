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
    """A prompt that ends with a user's or a tool's turn, and a better and a worse answer to it.

    One of the answers is None if the row has a single answer, which is labelled good or bad.
    """

    prompt: list[Message]
    chosen: Message | None
    rejected: Message | None
    context: Context = field(default_factory=Context)

    @property
    def answers(self) -> dict[str, Message]:
        """The answers that there are, by their side."""
        sides = {"chosen": self.chosen, "rejected": self.rejected}
        return {side: answer for side, answer in sides.items() if answer is not None}

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
    """Token ids of one pair; each answer ends with exactly one end token.

    A single answer has an empty one on the other side.
    """

    pair_id: str
    prompt: IntArray
    chosen: IntArray
    rejected: IntArray
