"""The wire between a driver and its workers while they train: news one way, the wish to stop the
other.
"""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Message:
    """News from a worker: `metrics` (step, total steps, numbers) or `announce` (a line)."""

    kind: Literal["metrics", "announce"]
    content: Any


class Mailbox:
    """A Ray actor that takes no CPU; nobody waits in it, so that it has work only when somebody
    calls.
    """

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._stop = self._has_listener = False

    def post(self, *messages: Message) -> None:
        """Leave messages."""
        self._messages += messages

    def collect(self) -> list[Message]:
        """All messages since the last call, in order of arrival."""
        messages, self._messages = self._messages, []
        return messages

    def exchange(self, *messages: Message) -> bool:
        """Leave messages, and learn whether to stop; who calls this counts as listening from then
        on.
        """
        self.post(*messages)
        self._has_listener = True
        return self._stop

    def request_stop(self) -> bool:
        """Ask the workers to end with a checkpoint; whether one of them listens already."""
        self._stop = True
        return self._has_listener
