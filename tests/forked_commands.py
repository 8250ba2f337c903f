"""Runs `orpo-ray` in processes of their own that find libraries loaded, see command_server.py."""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

from support import ENVIRONMENT, HANG_S, Done

SERVER = Path(__file__).with_name("command_server.py")
BEFORE_IMPORTS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
"""What a command settles before it loads libraries; and no GPU is touched before a fork."""


class ForkedCommand:
    """A command under way, in a session of its own."""

    def __init__(self, report: IO[bytes], out: int, err: int) -> None:
        self._report, self._out, self._err = report, out, err
        self._pid = int(self._told())
        self.cpu_s = 0.0
        """User and system time of the command and of those that it waited for, once it has ended.
        """

    def said(self) -> str:
        """What it has told the user so far."""
        return _text(self._err)

    def send_signal(self, number: signal.Signals) -> None:
        """To the command alone; it may have ended by itself."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, number)

    def has_ended(self, within_s: float) -> bool:
        """Whether it ends in that time."""
        return bool(select.select([self._report], [], [], within_s)[0])

    def end(self) -> Done:
        """Wait for its end; its exit code is negative where a signal ended it."""
        code, self.cpu_s = json.loads(self._told())
        done = Done(code, _text(self._out), self.said())
        self._report.close()
        os.close(self._out)
        os.close(self._err)
        return done

    def _told(self) -> bytes:
        assert self.has_ended(HANG_S), f"not within {HANG_S:.0f} s; it has said: {self.said()}"
        line = self._report.readline()
        assert line, "the server of commands has ended; its stderr says why"
        return line


class CommandServer:
    """Starts commands; it ends with this process, and the commands that are left with it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment` is what libraries find when they are loaded; each command has its own."""
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # -P: as for the real command, the modules of the tests are not there to be found.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(SERVER), str(theirs.fileno())],
                env={**environment, **BEFORE_IMPORTS},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        atexit.register(self.close)

    def start(
        self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> ForkedCommand:
        """Fork `orpo-ray` with these arguments."""
        out, err = os.memfd_create("stdout"), os.memfd_create("stderr")
        reading, writing = os.pipe()
        request = json.dumps([list(arguments), str(folder), dict(environment)]).encode()
        socket.send_fds(self._requests, [request], [out, err, writing])
        os.close(writing)
        return ForkedCommand(os.fdopen(reading, "rb", buffering=0), out, err)

    def close(self) -> None:
        """End it."""
        self._requests.close()
        self._process.wait()


@cache
def command_server() -> CommandServer:
    """The one of this process, from its first use on."""
    return CommandServer(ENVIRONMENT)


def _text(file: int) -> str:
    """All of a file that another process writes to, at a place that reading must not move."""
    return os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", errors="replace")
