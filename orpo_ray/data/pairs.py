"""What a row becomes: a pair of messages, a refusal, or a pair of token ids."""

from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
Row = dict[str, Any]


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt that ends with a user turn, and a better and a worse answer to it."""

    prompt: list[Message]
    chosen: str
    rejected: str

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
