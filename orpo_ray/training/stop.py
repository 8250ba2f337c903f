"""Ctrl-C and SIGTERM as a request to stop at the end of the step, with a checkpoint."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """While it is entered, the first signal only sets `requested`; a second one acts as it always did."""

    def __init__(
        self, announce: Callable[[str], None], says: str = "stopping, with a checkpoint if training has begun"
    ) -> None:
        self.requested = False
        self._says = says
        self._announce = announce
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only; elsewhere the caller has its own way to stop.
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        self._announce(f"{signal.Signals(number).name}: {self._says} (again: at once)")

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._former = {}
