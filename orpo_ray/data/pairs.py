"""What a row becomes: a pair of messages, a refusal, or a pair of token ids."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, NotRequired, Self, TypedDict

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
Ranges = npt.NDArray[np.int32]
"""Token ranges [start, stop) of one side, in order, [k, 2]."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A prompt that ends with a user's or a tool's turn, and a better and a worse answer to it.

    `chosen` and `rejected` are the last turns. If the two sides part at an earlier assistant turn,
    that turn and those after it are in `before_chosen` and `before_rejected`. One of the answers is
    None if the row has a single answer, which is labelled good or bad.
    """

    prompt: list[Message]
    chosen: Message | None
    rejected: Message | None
    context: Context = field(default_factory=Context)
    before_chosen: list[Message] = field(default_factory=list)
    before_rejected: list[Message] = field(default_factory=list)

    @property
    def answers(self) -> dict[str, list[Message]]:
        """The turns of the answers that there are, by their side."""
        sides = {
            "chosen": (self.before_chosen, self.chosen),
            "rejected": (self.before_rejected, self.rejected),
        }
        return {side: [*before, last] for side, (before, last) in sides.items() if last is not None}

    @property
    def multi_turn(self) -> bool:
        """Whether a side has assistant turns before its last."""
        earlier = (*self.prompt, *self.before_chosen, *self.before_rejected)
        return any(message["role"] == "assistant" for message in earlier)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a row is not used: a code of `checks.REASONS`, and what exactly was found."""

    code: str
    detail: str = ""


def ranges_of(*bounds: tuple[int, int]) -> Ranges:
    """Ranges from their bounds, without the empty ones."""
    kept = [each for each in bounds if each[0] < each[1]]
    return np.array(kept, np.int32) if kept else np.zeros((0, 2), np.int32)


class Trained(NamedTuple):
    """Which tokens of a pair's prompt and answers are trained."""

    prompt: Ranges
    chosen: Ranges
    rejected: Ranges

    @property
    def counts(self) -> list[int]:
        """The number of trained tokens of prompt, chosen and rejected."""
        return [int((ranges[:, 1] - ranges[:, 0]).sum()) for ranges in self]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPair:
    """Token ids of one pair, and which of them are trained; each turn ends with one end token.

    A single answer has an empty one on the other side. `written` is the text of the prompt, which
    only a pair has that was tokenised just now.
    """

    pair_id: str
    prompt: IntArray
    chosen: IntArray
    rejected: IntArray
    trained: Trained
    written: str = ""

    @classmethod
    def of_answers(
        cls, pair_id: str, prompt: IntArray, chosen: IntArray, rejected: IntArray
    ) -> Self:
        """A pair of which the answers are trained, and nothing of the prompt."""
        trained = Trained(ranges_of(), *(ranges_of((0, len(ids))) for ids in (chosen, rejected)))
        return cls(
            pair_id=pair_id, prompt=prompt, chosen=chosen, rejected=rejected, trained=trained
        )
