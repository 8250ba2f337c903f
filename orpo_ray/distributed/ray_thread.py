"""A thread that calls Ray, so that the main thread can answer Ctrl-C and end at any moment."""

import ctypes
import threading
from collections.abc import Callable

from orpo_ray.errors import RunError

_LEAVE_S = 10.0


class RayThread(threading.Thread):
    """Does `work`, which waits for Ray: `fit()` of Train and of Tune, or the batches of Ray Data.

    The thread that starts it must call `leave` in the end, even after an error.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(name="ray", daemon=True)
        self._work = work
        self._is_left = False
        self.error: Exception | None = None
        """The error that the work raised, or None."""

    def run(self) -> None:
        """Do the work and keep its error."""
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - kept for the main thread, which decides
            self.error = error
        except BaseException as error:  # noqa: BLE001 - no caller above a thread would see it
            if not self._is_left:  # otherwise `leave` ended the work, and its error is expected
                self.error = RunError("the work was broken off without an error")
                self.error.__cause__ = error

    def leave(self) -> None:
        """Stop the work if it still runs, so that it calls Ray no more.

        A call after Ray's end would end this process with Ray's exit code. A thread that waits
        inside Ray cannot be stopped and keeps waiting, which does no harm.
        """
        self._is_left = True
        if self.is_alive() and self.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self.ident), ctypes.py_object(SystemExit)
            )
            self.join(_LEAVE_S)
