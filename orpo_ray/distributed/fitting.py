"""Ray's `fit()`, of Train and of Tune, beside the thread that hears Ctrl-C."""

import ctypes
import threading
from typing import Any

_LEAVE_S = 2.0


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
        except SystemExit:
            return  # left

    def leave(self) -> None:
        """Call Ray no more, where it was not waited for: a call after Ray's end would end the process, with Ray's code.

        A thread that waits for Ray stays where it is, which does no harm.
        """
        if self.is_alive() and self.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(SystemExit))
            self.join(_LEAVE_S)
