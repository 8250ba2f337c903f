"""What a command says: announcements and progress on stderr, its result on stdout, library noise in a log file."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

LOG_FILE = "run.log"

_log = logging.getLogger("orpo_ray")


def announce(line: str) -> None:
    """Tell the user something that was decided or found, and keep it in the log."""
    print(line, file=sys.stderr, flush=True)
    _log.info(line)


def open_log(folder: Path | None = None) -> None:
    """Send what libraries log and warn about to `folder`/run.log, or to a temporary file, instead of the terminal."""
    if folder is None:
        path = Path(tempfile.mkdtemp(prefix="orpo-ray-")) / LOG_FILE
    else:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOG_FILE
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    for former in [h for h in root.handlers if isinstance(h, logging.FileHandler)]:
        root.removeHandler(former)
    root.addHandler(handler)
    _log.setLevel(logging.INFO)
    logging.captureWarnings(True)
    # Read by the libraries when they are imported, which is why commands call this first.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def log_failure(error: BaseException) -> None:
    """Keep an error with its traceback in the log."""
    if full_log() is None:
        open_log()
    _log.error("the command failed", exc_info=error)


def full_log() -> str | None:
    """The path of the log file, if one is open."""
    handlers = (handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler))
    return next((handler.baseFilename for handler in handlers), None)


@contextmanager
def stdout_for_result(alone: bool) -> Iterator[TextIO]:
    """The real stdout. If `alone`, whatever else is printed meanwhile, by any library, goes to stderr."""
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
