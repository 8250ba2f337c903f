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

        Raises ConfigError if other settings made its beginning, or if it cannot be written.
        """
        rows = self._read()
        if not rows:
            self._append([settings], new=True)
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
            return [json.loads(line) for line in lines]
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
        """Keep nothing but these answers; what follows them is written again."""
        self._append([settings, *rows], new=True)

    def add(self, rows: Sequence[Row]) -> None:
        """Add answers, which are on disk when this returns. Raises RunError if they are not."""
        self._append(rows, new=False)

    def finish(self, lines: Iterable[str]) -> None:
        """Write the file itself, then drop what was collected."""
        try:
            with written_whole(self._out) as file:
                file.writelines(lines)
            self._part.unlink()
        except OSError as error:
            raise RunError(f"{self._out}: cannot be written: {error.strerror}") from error

    def _append(self, rows: Sequence[Row], *, new: bool) -> None:
        try:
            with self._part.open("w" if new else "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            kind = ConfigError if new else RunError
            raise kind(f"out: {self._part}: {error.strerror}") from error
