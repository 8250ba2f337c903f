"""Ray's `fit()`, of Train and of Tune, beside the thread that hears Ctrl-C."""

import threading
from typing import Any


class Fitting(threading.Thread):
    """`fit()` in a thread of its own: in the main one it would take over Ctrl-C."""

    def __init__(self, fits: Any) -> None:
        super().__init__(name="ray-fit", daemon=True)
        self._fits = fits
        self.error: Exception | None = None

    def run(self) -> None:
        """Wait for the end of what was started."""
        try:
            self._fits.fit()
        except Exception as error:  # noqa: BLE001 - handed to the main thread, which decides
            self.error = error
