"""Verdicts from an endpoint: several questions at once, tries after failures, a limit on requests.

Threads ask. What they find is given to the one thread that keeps it, so no verdict that was paid
for is lost.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool

from orpo_ray.data.pairs import Message
from orpo_ray.errors import ConfigError, OrpoRayError, RunError, StoppedError
from orpo_ray.evaluation.judge.asking import (
    INSTRUCTIONS,
    ORDERS,
    UNREADABLE,
    asked_again,
    question,
    winner,
)
from orpo_ray.evaluation.judge.endpoint import Chat, Endpoint, Failed, Patience, Refused
from orpo_ray.evaluation.judge.judging import Left, Place, Row
from orpo_ray.runs.console import Console

STOPPED = "stopped; the same command goes on where it was"
_LOOK_S = 0.2
"""How often a pause looks for a request to stop."""


@dataclass(frozen=True, kw_only=True)
class ByEndpoint:
    """A model behind an endpoint that compares answers, in both orders."""

    endpoint: Endpoint
    chat: Chat
    patience: Patience
    parallel: int = 4
    max_requests: int | None = None

    def __post_init__(self) -> None:
        if self.parallel < 1:
            raise ConfigError(f"parallel: must be 1 or more, not {self.parallel}")
        if self.max_requests is not None and self.max_requests < 1:
            raise ConfigError(f"max_requests: must be 1 or more, not {self.max_requests}")

    @property
    def name(self) -> str:
        """The model's name."""
        return self.endpoint.model

    @property
    def orders(self) -> Sequence[str | None]:
        """Both: a judge may prefer the first answer, or the last."""
        return ORDERS

    @property
    def settings(self) -> Row:
        """Who is asked, and how."""
        return {
            "judge": self.endpoint.model,
            "endpoint": self.endpoint.url,
            "way of asking": INSTRUCTIONS,
        }

    def verdicts(self, left: Left, said: Console) -> Iterator[Row]:
        """Verdicts as they come.

        Raises StoppedError at the limit of requests, RunError if the endpoint does not answer, and
        ConfigError if it refuses key or model.
        """
        said.announce(self._needed(left))
        asking = _Asking(self, left, said)
        with ThreadPool(self.parallel) as pool:
            for row in pool.imap_unordered(asking.settle, left.places):
                if row is not None:
                    yield row
        if asking.failure is not None:
            raise asking.failure

    def _needed(self, left: Left) -> str:
        count = len(left.places)
        line = f"{count} verdicts to ask for, with one request each if nothing fails"
        allowed = None if self.max_requests is None else self.max_requests - left.requests
        if allowed is not None and allowed < count:
            line += f"; max_requests leaves {max(0, allowed)}, so the command will stop before"
        return line


class _Asking:
    """What the threads of a command share."""

    def __init__(self, by: ByEndpoint, left: Left, said: Console) -> None:
        self._by = by
        self._left = left
        self._said = said
        self._made = left.requests
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self.failure: OrpoRayError | None = None
        """The first error. After it nothing new is asked."""

    def settle(self, place: Place) -> Row | None:
        """The verdict of a place; only the requests if there is none, or nothing without any."""
        asked = _Question(self, self._by, place.row)
        row = {"row": place.row, "order": place.order}
        assert place.order is not None, "an endpoint is asked in both orders"
        messages = question(self._left.rows[place.row], place.order)
        try:
            found, text = asked.verdict(messages, place.order)
        except OrpoRayError as error:
            with self._lock:
                self.failure = self.failure or error
            self._ending.set()
            return {**row, "requests": asked.requests} if asked.requests else None
        return {**row, "winner": found, "text": text, "requests": asked.requests}

    def take(self) -> None:
        """Count a request before it is made. Raises StoppedError if there must be none."""
        if self._ending.is_set() or self._said.stop_requested():
            raise StoppedError(STOPPED)
        with self._lock:
            if self._by.max_requests is not None and self._made >= self._by.max_requests:
                raise StoppedError(
                    f"max_requests: {self._made} requests were made; the same command with a "
                    "larger limit goes on"
                )
            self._made += 1

    def pause(self, seconds: float) -> None:
        """Wait, but not when the command ends."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._said.stop_requested():
            if self._ending.wait(min(left, _LOOK_S)):
                return


class _Question:
    """One question on its way to a verdict."""

    def __init__(self, asking: _Asking, by: ByEndpoint, row: int) -> None:
        self._asking = asking
        self._by = by
        self._row = row
        self.requests = 0

    def verdict(self, messages: list[Message], order: str) -> tuple[str, str]:
        """The winner, or "unreadable" after several answers without a verdict; the last answer."""
        asks, answer = messages, ""
        for _ in range(self._by.patience.readings):
            answer = self._answer(asks)
            if (found := winner(answer, order)) is not None:
                return found, answer
            asks = asked_again(messages, answer)
        return UNREADABLE, answer

    def _answer(self, messages: list[Message]) -> str:
        """What the judge says, by as many tries as it takes."""
        patience, url = self._by.patience, self._by.endpoint.url
        failures = 0
        while True:
            self._asking.take()
            self.requests += 1
            try:
                return self._by.chat.say(messages)
            except Failed as failed:
                failures += 1
                if failures == patience.tries:
                    raise RunError(
                        f"{url} has not answered {failures} times: {failed}; the verdicts so far "
                        "are kept, and the same command goes on"
                    ) from failed
                self._asking.pause(patience.pause(failures, failed.wait))
            except Refused as refused:
                raise RunError(
                    f"{url} refuses the question on row {self._row + 1}: {refused}; leave that row "
                    "out of both files, or name another judge"
                ) from refused
