"""The wire between a driver and its workers while they train: news one way, the wish to stop the other."""

import asyncio
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Message:
    """News from a worker: `metrics` (step, total steps, numbers) or `announce` (a line)."""

    kind: Literal["metrics", "announce"]
    content: Any


class Mailbox:
    """A Ray actor that takes no CPU. Workers post without waiting; the driver waits until there is news."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._news = asyncio.Event()
        self._stop = asyncio.Event()
        self._has_listener = False

    async def post(self, *messages: Message) -> None:
        """Leave messages."""
        self._messages += messages
        self._news.set()

    async def collect(self, wait_s: float) -> list[Message]:
        """All messages since the last call, in order of arrival; waits that long for the first one."""
        if not self._messages:
            try:
                await asyncio.wait_for(self._news.wait(), wait_s)
            except TimeoutError:
                return []
        messages, self._messages = self._messages, []
        self._news.clear()
        return messages

    async def request_stop(self) -> bool:
        """Ask the workers to end with a checkpoint; whether one of them listens already."""
        self._stop.set()
        return self._has_listener

    async def wait_for_stop(self) -> None:
        """Return when a stop is asked for."""
        self._has_listener = True
        await self._stop.wait()
