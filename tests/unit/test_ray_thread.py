"""The thread of Ray's `fit()`: `leave` ends it between calls, but not while it waits."""

import sys
import threading
import time
from collections.abc import Callable

import pytest

from orpo_ray.distributed.ray_thread import RayThread
from orpo_ray.errors import RunError


class Calling:
    """Makes many short calls, one after another."""

    def fit(self) -> None:
        while True:
            time.monotonic()


class Waiting:
    """Waits outside of Python's own code, as `ray.get` does."""

    def __init__(self) -> None:
        self.waits, self.news = threading.Event(), threading.Event()

    def fit(self) -> None:
        self.waits.set()
        self.news.wait()


def test_a_thread_that_makes_calls_makes_no_more() -> None:
    fitting = RayThread(Calling().fit)
    fitting.start()
    fitting.leave()
    assert not fitting.is_alive()
    assert fitting.error is None


def test_a_thread_that_waits_is_not_waited_for() -> None:
    waiting = Waiting()
    fitting = RayThread(waiting.fit)
    fitting.start()
    waiting.waits.wait()
    began = time.monotonic()
    fitting.leave()
    assert time.monotonic() - began < 30
    assert fitting.is_alive()
    waiting.news.set()
    fitting.join()
    assert fitting.error is None


def test_leaving_a_thread_that_has_ended_is_nothing() -> None:
    failing = RayThread(lambda: None.fit())
    failing.start()
    failing.join()
    assert isinstance(failing.error, AttributeError)
    failing.leave()


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("work", [sys.exit, interrupt])
def test_a_thread_that_is_broken_off_by_others_has_an_error(work: Callable[[], None]) -> None:
    """Without an error, the thread that waits would think that the work is done."""
    broken_off = RayThread(work)
    broken_off.start()
    broken_off.join()
    assert isinstance(broken_off.error, RunError)
