"""SIGINT and SIGTERM: the first is a request, the second acts; afterwards all is as before."""

import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest
from support import Listener

from orpo_ray.runs.console import SILENT
from orpo_ray.runs.stop import SIGNALS, StopSignal, interrupt

received: list[int] = []


@pytest.fixture(autouse=True)
def former_handlers() -> Iterator[None]:
    """Handlers of our own in place of the usual ones, which would end the tests."""

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    received.clear()
    before = {number: signal.signal(number, remember) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    """Python runs the handler before this returns: the signal comes from the main thread itself."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_acts_as_it_always_did(number: signal.Signals) -> None:
    console = Listener()
    with StopSignal(console) as stop:
        assert not stop.stop_requested()
        send(number)
        assert stop.stop_requested()
        assert received == []
        assert console.said == [
            f"{number.name}: stopping, with a checkpoint if training has begun "
            "(a second signal stops at once)"
        ]
        send(number)
        assert received == [number]
    assert len(console.said) == 1


def test_one_signal_gives_both_their_old_meaning_back() -> None:
    with StopSignal(SILENT):
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert received == [signal.SIGINT]


def test_an_interruption_that_python_dropped_asks_to_stop_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python drops what a destructor raises."""
    monkeypatch.setattr("orpo_ray.runs.stop._heard", threading.Event())
    monkeypatch.setattr("sys.unraisablehook", lambda dropped: None)

    class Interrupted:
        def __del__(self) -> None:
            send(signal.SIGINT)

    signal.signal(signal.SIGINT, interrupt)
    with StopSignal(SILENT) as stop:
        assert not stop.stop_requested()
    del stop
    one = Interrupted()
    del one
    with StopSignal(SILENT) as stop:
        assert stop.stop_requested()


def test_outside_the_block_nothing_has_changed() -> None:
    with StopSignal(SILENT) as stop:
        pass
    for number in SIGNALS:
        send(number)
    assert received == list(SIGNALS)
    assert not stop.stop_requested()


def test_a_failure_inside_gives_the_handlers_back() -> None:
    with pytest.raises(RuntimeError), StopSignal(SILENT):
        raise RuntimeError
    send(signal.SIGINT)
    assert received == [signal.SIGINT]


def test_another_thread_leaves_signals_alone() -> None:
    """There Python allows no handlers; a worker is stopped in its own way."""
    states: list[bool] = []

    def work() -> None:
        with StopSignal(SILENT) as stop:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            states.append(stop.stop_requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert states == [False]
    assert received == [signal.SIGINT]
