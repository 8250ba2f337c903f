"""Decides which log records run.log keeps while a run is trained."""

import logging

FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"
"""A line of run.log, in every process that writes one."""
_OURS = "orpo_ray"


def is_kept(record: logging.LogRecord) -> bool:
    """Whether a record belongs into run.log: our own lines, and errors of libraries.

    Warnings of libraries help only those who maintain this program. `--verbose` keeps them, too.
    """
    ours = record.name == _OURS or record.name.startswith(f"{_OURS}.")
    return ours or record.levelno >= logging.ERROR
