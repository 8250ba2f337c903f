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
from orpo_ray.evaluation.judge.endpoint import Changed, Chat, Endpoint, Failed, Patience, Refused
from orpo_ray.evaluation.judge.judging import Left, Place, Row
from orpo_ray.runs.console import Console

STOPPED = "stopped; the same command goes on where it was"
_REFUSALS = 10
"""After so many refusals and no answer, the endpoint takes no question at all."""
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
        waiting: list[Row] = []
        with ThreadPool(self.parallel) as pool:
            for row in pool.imap_unordered(asking.settle, left.places):
                waiting += [] if row is None else [row]
                # Refusals of an endpoint that answers nothing say nothing of the questions.
                if asking.answers:
                    yield from waiting
                    waiting = []
        if asking.failure is None:
            yield from waiting
            return
        yield from ({**_at(row), "requests": row["requests"]} for row in waiting)
        raise asking.failure

    def _needed(self, left: Left) -> str:
        count = len(left.places)
        line = f"{count} verdicts to ask for, with one request each if nothing fails"
        allowed = None if self.max_requests is None else self.max_requests - left.requests
        if allowed is not None and allowed < count:
            line += f"; max_requests leaves {max(0, allowed)}, so the command will stop before"
        return line


def _at(row: Row) -> Row:
    return {"row": row["row"], "order": row["order"]}


class _Asking:
    """What the threads of a command share."""

    def __init__(self, by: ByEndpoint, left: Left, said: Console) -> None:
        self._by = by
        self._left = left
        self._said = said
        self._made = left.requests
        self._refusals = 0
        self._has_failed = False
        self._changes: set[str] = set()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self.failure: OrpoRayError | None = None
        """The first error. After it nothing new is asked."""
        self.answers = 0
        """How often the endpoint has answered."""

    def settle(self, place: Place) -> Row | None:
        """The verdict of a place; only the requests if there is none, or nothing without any."""
        asked = _Question(self, self._by)
        row = {"row": place.row, "order": place.order}
        assert place.order is not None, "an endpoint is asked in both orders"
        messages = question(self._left.rows[place.row], place.order)
        try:
            found, text = asked.verdict(messages, place.order)
        except Refused as refused:
            found, text = UNREADABLE, f"refused: {refused}"
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

    def tell(self, refusal: Refused | None) -> None:
        """Count an answer, or a refusal. Raises RunError if there is nothing but refusals."""
        with self._lock:
            self.answers += refusal is None
            self._refusals += refusal is not None
            is_hopeless = not self.answers and self._refusals == _REFUSALS
        if is_hopeless:
            raise RunError(f"{self._by.endpoint.url} refuses every question: {refusal}")

    def change(self, changed: Changed) -> None:
        """Announce that questions are asked in another way. Several requests may learn of it."""
        line = str(changed)
        with self._lock:
            is_new = line not in self._changes
            self._changes.add(line)
        if is_new:
            self._said.announce(f"{self._by.endpoint.url}: {line}")

    def wait(self, seconds: float, failed: Failed) -> None:
        """Pause after a failure, but not when the command ends. The first one is announced."""
        with self._lock:
            is_first, self._has_failed = not self._has_failed, True
        if is_first:
            self._said.announce(f"{self._by.endpoint.url}: {failed}; it is asked again")
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._said.stop_requested():
            if self._ending.wait(min(left, _LOOK_S)):
                return


class _Question:
    """One question on its way to a verdict."""

    def __init__(self, asking: _Asking, by: ByEndpoint) -> None:
        self._asking = asking
        self._by = by
        self.requests = 0

    def verdict(self, messages: list[Message], order: str) -> tuple[str, str]:
        """The winner, or "unreadable" after several answers without a verdict; the last answer.

        Raises Refused if the endpoint does not take the question.
        """
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
                answer = self._by.chat.say(messages)
            except Failed as failed:
                failures += 1
                if failures == patience.tries:
                    raise RunError(
                        f"{url} has not answered {failures} times: {failed}; the verdicts so far "
                        "are kept, and the same command goes on"
                    ) from failed
                self._asking.wait(patience.pause(failures, failed.wait), failed)
            except Changed as changed:
                self._asking.change(changed)
            except Refused as refused:
                self._asking.tell(refused)
                raise
            else:
                self._asking.tell(None)
                return answer
