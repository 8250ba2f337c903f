"""Answers on their way to a file. A command that was killed goes on with those that are there.

They are collected in OUT.part: one line with the settings, then one line for each answer. OUT
itself is written at the end, in one step.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from orpo_ray.errors import ConfigError, RunError
from orpo_ray.runs.files import written_whole

Row = dict[str, Any]


class AnswersFile:
    """The collected answers of one command."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._part = out.with_name(f"{out.name}.part")

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
                file.writelines(map(_line, [settings, *rows]))
        except OSError as error:
            raise ConfigError(f"out: {self._part}: {error.strerror}") from error

    def add(self, rows: Sequence[Row]) -> None:
        """Add answers, which are on disk when this returns. Raises RunError if they are not."""
        try:
            with self._part.open("a", encoding="utf-8") as file:
                file.writelines(map(_line, rows))
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


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
