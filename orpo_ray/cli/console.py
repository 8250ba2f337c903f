"""What a command says: announcements and progress on stderr, its result on stdout, library noise in
a log file.

Settings and storage are imported where they are used: --help needs neither.
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
from orpo_ray.runs.log import is_kept

if TYPE_CHECKING:
    from orpo_ray.runs.run import RunFolder
    from orpo_ray.runs.search import Search
    from orpo_ray.storage import Storage

_log = logging.getLogger("orpo_ray")


class _LogFile(logging.FileHandler):
    """The one log file of this process; told by its class from handlers that others attach.

    `kept_in` is where the log of a run belongs, None while there is no run yet.
    """

    def __init__(self, path: Path, everything: bool, kept_in: Storage | None = None) -> None:
        super().__init__(path, encoding="utf-8")
        self.kept_in = kept_in
        self.everything = everything
        if not everything:
            self.addFilter(is_kept)


def announce(line: str) -> None:
    """Tell the user something that was decided or found, and keep it in the log."""
    print(f"{fresh_line()}{line}", file=sys.stderr, flush=True)
    _log.info(line)


def fresh_line() -> str:
    """What wipes the progress line that a terminal may be showing; nothing elsewhere."""
    return "\r\x1b[K" if sys.stderr.isatty() else ""


class Terminal(Console):
    """The user at a terminal.

    The log moves on to the folder of `run` once the run has begun. It begins once it holds its lock
    and has written the config, settings and data being fine: before both, there is nothing to add
    to a log that may be another process's.
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
        """Show the progress of a run."""
        if self._progress is not None:
            self._progress(step, total_steps, metrics)

    def watch_search(self, search: Search) -> None:
        """Show a search's table."""
        if self._table is not None:
            self._table(search)


def open_log(verbose: bool = False) -> None:
    """Log to a temporary file, not to the terminal; if `verbose`, to both, with all warnings."""
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
    # On a full disk every line logged would otherwise print a traceback; what cannot do without the
    # disk tells it once.
    logging.raiseExceptions = False
    threading.excepthook = _log_thread_failure
    # Read by the libraries when they are imported, which is why commands call this first.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _log_to(handler: _LogFile) -> None:
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    for former in _log_files():
        root.removeHandler(former)
        former.close()
    root.addHandler(handler)


def _move_log(path: Path, kept_in: Storage) -> None:
    """Log to `path` from now on, after what the log has so far; on a full disk the log stays where
    it is.
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
    """Keep what kills a library's background thread, such as TensorBoard's writer, off the terminal
    too.
    """
    _log.error("a thread failed", exc_info=failure.exc_value)


def log_failure(error: BaseException) -> None:
    """Keep an error with its traceback in the log; of a wanted stop, one line."""
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
    """Keep the log as the run is kept, and say where it is; it is here where the storage cannot be
    reached.
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


def _log_files() -> list[_LogFile]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, _LogFile)]


class _LogStream(io.TextIOBase):
    """A stdout that is kept in the log."""

    def write(self, text: str) -> int:
        if text.strip():
            _log.info(text.rstrip())
        return len(text)


@contextmanager
def prints_to_log(verbose: bool) -> Iterator[None]:
    """Keep what libraries print off the terminal: Ray tells of a dead worker in a page of text.

    Shown if `verbose`.
    """
    if verbose:
        yield
        return
    with redirect_stdout(_LogStream()):
        yield


@contextmanager
def stdout_for_result(alone: bool) -> Iterator[TextIO]:
    """The real stdout.

    If `alone`, whatever else is printed meanwhile, by any library, goes to stderr.
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
