"""A thread that calls Ray, beside the main one, which hears Ctrl-C and may end at any moment."""

import ctypes
import threading
from collections.abc import Callable

from orpo_ray.errors import RunError

_LEAVE_S = 2.0


class RayThread(threading.Thread):
    """Does `work`, which waits for Ray: `fit()` of Train and of Tune, or the batches of Ray Data.

    Whoever starts it leaves it in the end, however that comes.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(name="ray", daemon=True)
        self._work = work
        self._is_left = False
        self.error: Exception | None = None
        """What the work raised."""

    def run(self) -> None:
        """Work to the end."""
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - handed to the main thread, which decides
            self.error = error
        except BaseException as error:  # noqa: BLE001 - nobody is above a thread to hear of it
            if not self._is_left:  # else whoever started it wants no more of it
                self.error = RunError("the work was broken off without an error")
                self.error.__cause__ = error

    def leave(self) -> None:
        """Call Ray no more, where it was not waited for: a call after Ray's end would end the
        process, with Ray's code.

        A thread that waits for Ray stays where it is, which does no harm.
        """
        self._is_left = True
        if self.is_alive() and self.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self.ident), ctypes.py_object(SystemExit)
            )
            self.join(_LEAVE_S)
