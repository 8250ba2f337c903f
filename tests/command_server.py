"""`orpo-ray` in processes forked from one that has loaded what training needs: nine CPU seconds,
once.

Started by forked_commands.py. A request over its socket is arguments, folder and environment, with
files for stdout and stderr, and a pipe on which the child's pid is reported, then its end.
Ray is left to the commands: it starts threads, and no fork takes threads along.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path

MOST_BYTES = 2**17
"""Of a request."""
LOADED = (
    "orpo_ray.training.loop",
    "orpo_ray.evaluation.evaluate",
    "orpo_ray.api",
    "orpo_ray.cli.main",
    "bitsandbytes",
    "peft",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
)
"""Ours first: it settles what the libraries load for themselves."""

Request = tuple[list[str], str, dict[str, str]]


def serve(requests: socket.socket) -> Request:
    """Fork for each request; returns in a child, with what it was asked for."""
    running: dict[int, tuple[int, int]] = {}
    """For a descriptor that tells of a child's end: its pid, and where to report."""
    while True:
        ready, _, _ = select.select([requests, *running], [], [])
        for ended in running.keys() & set(ready):
            report_end(ended, *running.pop(ended))
        if requests not in ready:
            continue
        message, files, _, _ = socket.recv_fds(requests, MOST_BYTES, 3)
        if not message:
            for pid, _ in running.values():
                os.kill(pid, signal.SIGKILL)
            sys.exit()
        assert threading.enumerate() == [threading.main_thread()], "a fork would lose threads"
        out, err, report = files
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.dup2(out, 1)
            os.dup2(err, 2)
            requests.close()
            others = [each for ended, (_, told) in running.items() for each in (ended, told)]
            for descriptor in (*files, *others):
                os.close(descriptor)
            return json.loads(message)
        os.close(out)
        os.close(err)
        running[os.pidfd_open(pid)] = (pid, report)
        tell(report, pid)


def report_end(ended: int, pid: int, report: int) -> None:
    """Report a child's exit code, negative after a signal, and CPU seconds: its own and those of
    its children.
    """
    _, status, used = os.wait4(pid, 0)
    tell(report, [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime])
    os.close(report)
    os.close(ended)


def tell(report: int, what: object) -> None:
    """Write one line, to a test that may be gone."""
    with suppress(BrokenPipeError):
        os.write(report, json.dumps(what).encode() + b"\n")


def run(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """What the console script does."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [str(Path(sys.executable).with_name("orpo-ray")), *arguments]
    sys.modules["orpo_ray.cli.main"].main()


if __name__ == "__main__":
    for name in LOADED:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    gc.freeze()
    run(*serve(socket.socket(fileno=int(sys.argv[1]))))
