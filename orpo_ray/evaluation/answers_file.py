"""Answers on their way to a file. A command that was killed goes on with those that are there.

They are collected in OUT.part: one line with the settings, then one line for each answer. OUT
itself is written at the end, in one step. The verdicts of a judge are collected in the same way.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from orpo_ray.errors import ConfigError, RunError
from orpo_ray.evaluation.answer_formats import line_of
from orpo_ray.runs.files import written_whole
from orpo_ray.runs.lock import LockedError, locked_meanwhile

Row = dict[str, Any]


def refuse_unwritable(out: Path) -> None:
    """Raise ConfigError for a file that is there already, or whose folder is not."""
    if not out.parent.is_dir():
        raise ConfigError(f"out: no folder {out.parent}")
    if out.exists():
        raise ConfigError(f"out: {out} exists; name another file, or remove it")


class AnswersFile:
    """The collected answers of one command."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._part = out.with_name(f"{out.name}.part")
        self._lock = out.with_name(f".{out.name}.lock")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other commands away from the file.

        Raises ConfigError if one is at work on it, or has finished it meanwhile.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(locked_meanwhile(self._lock))
            except LockedError as error:
                raise ConfigError(
                    f"out: another command is writing {self._out}; wait for it, or name another "
                    "file"
                ) from error
            except OSError as error:
                raise ConfigError(f"out: {self._lock}: {error.strerror}") from error
            refuse_unwritable(self._out)
            yield

    def begin(self, settings: Row) -> list[Row]:
        """The answers of an earlier command with the same settings; none for a new file.

        Raises ConfigError if other settings made its beginning.
        """
        rows = self._read()
        if not rows:
            return []
        if rows[0] != settings:
            changed = [name for name in settings if rows[0].get(name) != settings[name]]
            raise ConfigError(
                f"out: {self._part} was begun with another {' and '.join(changed)}; remove it, "
                "or name another file"
            )
        return rows[1:]

    def _read(self) -> list[Row]:
        """The settings and the answers of an earlier command."""
        try:
            *lines, _ = self._part.read_bytes().split(b"\n")  # the last one may be unfinished
            rows = [json.loads(line) for line in lines]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a line is no object")
            return rows
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"out: {self._part}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(
                f"out: {self._part} is not what this command writes; remove it, or name another "
                "file"
            ) from error

    def keep(self, settings: Row, rows: Sequence[Row]) -> None:
        """Keep nothing but these answers; what follows them is written again.

        A process that is killed here leaves the file as it was. Raises ConfigError if it cannot be
        written.
        """
        try:
            with written_whole(self._part) as file:
                file.writelines(map(line_of, [settings, *rows]))
        except OSError as error:
            raise ConfigError(f"out: {self._part}: {error.strerror}") from error

    def add(self, rows: Sequence[Row]) -> None:
        """Add answers, which are on disk when this returns. Raises RunError if they are not."""
        try:
            with self._part.open("a", encoding="utf-8") as file:
                file.writelines(map(line_of, rows))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{self._part}: {error.strerror}") from error

    def finish(self, lines: Iterable[str]) -> None:
        """Write the file itself, then drop what was collected."""
        try:
            with written_whole(self._out) as file:
                file.writelines(lines)
            self._part.unlink()
        except OSError as error:
            raise RunError(f"{self._out}: cannot be written: {error.strerror}") from error
