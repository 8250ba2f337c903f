"""Runs a probe in a process of its own, so that one that hangs or crashes harms nothing."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from orpo_ray.errors import on_one_line

_DEATH_S = 1.0
"""A killed process that waits for a dead network disk does not end; it is left behind then."""
_CAUSE_LETTERS = 300


@dataclass(frozen=True)
class Outcome:
    """What a probe answered, as JSON; or why it did not."""

    answer: bytes = b""
    problem: str = ""


def limited(work: Callable[[], bytes], seconds: float) -> Outcome:
    """Do work in a child process that is killed after some seconds.

    The child's folder for temporary files is its own, and is removed after it. The process that
    calls this must have no threads.
    """
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="orpo-ray-", ignore_cleanup_errors=True) as folder:
        child = context.Process(target=_work, args=(work, sending, folder), daemon=True)
        child.start()
        sending.close()
        try:
            if not receiving.poll(seconds):
                return Outcome(problem=f"no answer within {seconds:.3g} s")
            kind, _, told = receiving.recv_bytes().partition(b":")
        except EOFError:
            child.join(_DEATH_S)
            return Outcome(problem=f"its process died (exit code {child.exitcode})")
        finally:
            child.kill()
            child.join(_DEATH_S)
            receiving.close()
    return Outcome(told) if kind == b"answer" else Outcome(problem=told.decode())


def _work(work: Callable[[], bytes], sending: Connection, folder: str) -> None:
    """The child's part. Its output is thrown away: a reader would wait for all who may write."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    tempfile.tempdir = folder
    try:
        told = b"answer:" + work()
    except Exception as error:  # noqa: BLE001 - whatever a library raises is a finding
        cause = f"{type(error).__name__}: {on_one_line(error)}"[:_CAUSE_LETTERS]
        told = b"problem:" + cause.encode(errors="replace")
    sending.send_bytes(told)
