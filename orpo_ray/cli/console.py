"""The output of a command: announcements on stderr, the result on stdout, the rest in a log file.

Settings and storage are imported in the functions that use them, because --help needs neither.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from orpo_ray.errors import ConfigError, OrpoRayError, StoppedError
from orpo_ray.runs.console import Console, Metrics
from orpo_ray.runs.files import CONFIG_FILE, LOG_FILE
from orpo_ray.runs.log import FORMAT, is_kept

if TYPE_CHECKING:
    from orpo_ray.runs.run import RunFolder
    from orpo_ray.runs.search import Search
    from orpo_ray.storage import Storage

_log = logging.getLogger("orpo_ray")


class _LogFile(logging.FileHandler):
    """The only log file of this process. `_log_files` recognises its handler by this class.

    `kept_in` is the storage of the run, or None before a run has begun.
    """

    def __init__(self, path: Path, everything: bool, kept_in: Storage | None = None) -> None:
        super().__init__(path, encoding="utf-8")
        self.kept_in = kept_in
        self.everything = everything
        if not everything:
            self.addFilter(is_kept)


def announce(line: str) -> None:
    """Say one line about what was decided or found, and keep it in the log."""
    print(f"{fresh_line()}{line}", file=sys.stderr, flush=True)
    _log.info(line)


def fresh_line() -> str:
    """The characters that wipe a progress line on a terminal; empty if stderr is no terminal."""
    return "\r\x1b[K" if sys.stderr.isatty() else ""


class Terminal(Console):
    """The user at a terminal.

    The log moves to the folder of `run` when the run begins: when this process holds the lock and
    has written the config. Before that, the log in that folder may belong to another process.
    """

    def __init__(
        self,
        run: RunFolder[Any] | None = None,
        progress: Callable[[int, int, Metrics], None] | None = None,
        table: Callable[[Search], None] | None = None,
    ) -> None:
        self._run = run
        self._progress = progress
        self._table = table

    def announce(self, line: str) -> None:
        """Print it to stderr, and keep it in the log."""
        if self._run is not None and self._run.is_ours and self._run.path(CONFIG_FILE).exists():
            _move_log(self._run.path(LOG_FILE), self._run.storage)
        announce(line)

    def watch(self, step: int, total_steps: int, metrics: Metrics) -> None:
        """Show the progress of a run; its evaluations go to the log, too."""
        if "eval/accuracy" in metrics:
            figures = (
                f"accuracy {metrics['eval/accuracy']:.3f}  margin {metrics['eval/margin']:.3f}"
            )
            _log.info("step %d/%d  held out: %s", step, total_steps, figures)
        if self._progress is not None:
            self._progress(step, total_steps, metrics)

    def watch_search(self, search: Search) -> None:
        """Show a search's table."""
        if self._table is not None:
            self._table(search)


def open_log(verbose: bool = False) -> None:
    """Log to a temporary file; if `verbose`, to the terminal, too, with all warnings."""
    try:
        _log_to(_LogFile(Path(tempfile.mkdtemp(prefix="orpo-ray-")) / LOG_FILE, verbose))
    except OSError as error:
        raise ConfigError(
            f"TMPDIR: the folder for temporary files cannot be written: {error.strerror}"
        ) from error
    if verbose:
        shown = logging.StreamHandler()
        shown.addFilter(lambda line: line.name != _log.name)  # announced already
        logging.getLogger().addHandler(shown)
    _log.setLevel(logging.INFO)
    logging.captureWarnings(True)
    # Without this, every logged line prints a traceback on a full disk. Code that needs the disk
    # reports the error once.
    logging.raiseExceptions = False
    threading.excepthook = _log_thread_failure
    # The libraries read these when they are imported, so commands call this function first.
    os.environ.setdefault("HF_HUB_VERBOSITY", "warning" if verbose else "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning" if verbose else "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Threads that wait for one another must not spin: on a busy machine they would take the CPUs
    # from those that compute.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _log_to(handler: _LogFile) -> None:
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    for former in _log_files():
        root.removeHandler(former)
        former.close()
    root.addHandler(handler)


def _move_log(path: Path, kept_in: Storage) -> None:
    """Move the log to `path`, with the lines that it has so far.

    On a full disk it stays where it is.
    """
    former = next(iter(_log_files()), None)
    if former is None or Path(former.baseFilename) == path.absolute():
        return
    written = Path(former.baseFilename)
    with suppress(OSError):
        with path.open("a", encoding="utf-8") as file:
            file.write(written.read_text(encoding="utf-8"))
        _log_to(_LogFile(path, former.everything, kept_in))
        shutil.rmtree(written.parent)


def _log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """Log the error of a library's thread, such as TensorBoard's writer, without printing it."""
    _log.error("a thread failed", exc_info=failure.exc_value)


def log_failure(error: BaseException) -> None:
    """Log an error with its traceback; for a stop that the user wanted, one line."""
    if full_log() is None:
        with suppress(ConfigError):
            open_log()
    if isinstance(error, StoppedError):
        _log.info("%s", error)
        return
    _log.error("the command failed", exc_info=error)


def full_log() -> str | None:
    """The path of the log file, if one is open."""
    return next((handler.baseFilename for handler in _log_files()), None)


def keep_log() -> str | None:
    """Store the log with its run, and return its place.

    If the storage cannot be reached, the place is the local path.
    """
    for handler in _log_files():
        if handler.kept_in is None:
            return handler.baseFilename
        try:
            handler.kept_in.store(Path(handler.baseFilename))
        except OrpoRayError as error:
            _log.error("the log is kept here only", exc_info=error)
            return handler.baseFilename
        return handler.kept_in.place_of(Path(handler.baseFilename))
    return None


def drop_temporary_log() -> None:
    """Close and delete a log that no run has, so that commands leave no folders behind."""
    for handler in _log_files():
        if handler.kept_in is None:
            logging.getLogger().removeHandler(handler)
            handler.close()
            shutil.rmtree(Path(handler.baseFilename).parent, ignore_errors=True)


def _log_files() -> list[_LogFile]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, _LogFile)]


class _LogStream(io.TextIOBase):
    """A stdout that writes to the log."""

    def write(self, text: str) -> int:
        if text.strip():
            _log.info(text.rstrip())
        return len(text)


@contextmanager
def prints_to_log(verbose: bool) -> Iterator[None]:
    """Redirect the output of libraries to the log. If `verbose`, leave it on the terminal.

    Ray, for example, prints a page of text about a dead worker.
    """
    if verbose:
        yield
        return
    with redirect_stdout(_LogStream()):
        yield


@contextmanager
def stdout_for_result(alone: bool) -> Iterator[TextIO]:
    """The real stdout.

    If `alone`, all other output in the meantime goes to stderr, also that of libraries.
    """
    if not alone:
        yield sys.stdout
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(saved), "w", encoding="utf-8") as stdout:
            yield stdout
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)
