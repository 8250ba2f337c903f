"""Ctrl-C and SIGTERM as a request to stop at the end of the step, with a checkpoint."""

import signal
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

from orpo_ray.runs.console import Console, Metrics

if TYPE_CHECKING:
    from orpo_ray.runs.search import Search

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal(Console):
    """A console that hears signals, too: the first one is a request to stop, a second one acts as
    it always did.

    It hears them while it is entered, and passes on to `console` whatever is said.
    """

    def __init__(
        self, console: Console, says: str = "stopping, with a checkpoint if training has begun"
    ) -> None:
        self._console = console
        self._says = says
        self._requested = False
        self._former: dict[signal.Signals, object] = {}

    def announce(self, line: str) -> None:
        """Pass it on."""
        self._console.announce(line)

    def watch(self, step: int, total_steps: int, metrics: Metrics) -> None:
        """Pass it on."""
        self._console.watch(step, total_steps, metrics)

    def watch_search(self, search: "Search") -> None:
        """Pass it on."""
        self._console.watch_search(search)

    def stop_requested(self) -> bool:
        """Whether a signal came, or the console was asked to stop."""
        return self._requested or self._console.stop_requested()

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only; elsewhere the caller has its own way to
        # stop.
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self._restore()
        self.announce(f"{signal.Signals(number).name}: {self._says} (again: at once)")

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._former = {}
