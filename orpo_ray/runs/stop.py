"""Ctrl-C and SIGTERM ask a run to stop at the end of the step, with a checkpoint."""

import signal
import threading
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

from orpo_ray.runs.console import Console, Metrics

if TYPE_CHECKING:
    from orpo_ray.runs.search import Search

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_heard = threading.Event()
"""Whether `interrupt` was called in this process."""


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal before a StopSignal listens: raise KeyboardInterrupt, and remember it.

    Python drops a KeyboardInterrupt that is raised in a destructor. Then the next StopSignal asks
    to stop at once.
    """
    _heard.set()
    signal.default_int_handler(number, frame)


class StopSignal(Console):
    """A console that takes a signal as a request to stop.

    A second signal has its usual effect. Signals are heard inside the `with` block only. What is
    announced or reported is passed on to `console`.
    """

    def __init__(
        self, console: Console, says: str = "stopping, with a checkpoint if training has begun"
    ) -> None:
        self._console = console
        self._says = says
        self._requested = _heard.is_set()
        self._former: dict[signal.Signals, object] = {}

    def announce(self, line: str) -> None:
        """Pass the line on."""
        self._console.announce(line)

    def watch(self, step: int, total_steps: int, metrics: Metrics) -> None:
        """Pass the numbers on."""
        self._console.watch(step, total_steps, metrics)

    def watch_search(self, search: "Search") -> None:
        """Pass the search on."""
        self._console.watch_search(search)

    def stop_requested(self) -> bool:
        """Whether a signal came, or the console was asked to stop."""
        return self._requested or self._console.stop_requested()

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only. In another thread the caller stops the
        # run in its own way.
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
        self.announce(
            f"{signal.Signals(number).name}: {self._says} (a second signal stops at once)"
        )

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._former = {}
