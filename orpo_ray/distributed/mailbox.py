"""Carries news from workers to their driver, and its request to stop to the workers."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Message:
    """News from a worker: `metrics` (step, total steps, numbers) or `announce` (a line)."""

    kind: Literal["metrics", "announce"]
    content: Any


class Mailbox:
    """A Ray actor that reserves no CPU. No call waits in it, so it is idle between calls."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._stop = self._has_listener = False

    def post(self, *messages: Message) -> None:
        """Leave messages for the driver."""
        self._messages += messages

    def collect(self) -> list[Message]:
        """All messages since the last call, in order of arrival."""
        messages, self._messages = self._messages, []
        return messages

    def exchange(self, *messages: Message) -> bool:
        """Leave messages, and return whether to stop; the caller counts as a listener now."""
        self.post(*messages)
        self._has_listener = True
        return self._stop

    def request_stop(self) -> bool:
        """Ask the workers to end with a checkpoint; returns whether one of them listens yet."""
        self._stop = True
        return self._has_listener
