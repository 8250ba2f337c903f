"""Shows the output of a job on a cluster as if the command ran here."""

import json
import re
import shutil
import sys
from typing import Any

from orpo_ray.cli.console import fresh_line

_PROGRESS = re.compile(r"step \d+/\d+(  |$)")
_COMPLAINT = "orpo-ray: "


class Follower:
    """Takes in a job's lines, one by one."""

    def __init__(self) -> None:
        self.result: dict[str, Any] | None = None
        """The JSON object of the command: its result, or its error."""
        self._terminal = sys.stderr.isatty()
        self._on_progress_line = False

    def __call__(self, line: str) -> None:
        """Show a line. The command's result is kept, and printed at the end."""
        if (found := _result(line)) is not None:
            self.result = found
        elif line.startswith(_COMPLAINT):
            return  # the result says the same
        elif self._terminal and _PROGRESS.match(line):
            # A line that wraps cannot be wiped.
            shown = line[: shutil.get_terminal_size().columns - 1]
            print(f"{fresh_line()}{shown}", end="", file=sys.stderr, flush=True)
            self._on_progress_line = True
        else:
            self.end_line()
            print(line, file=sys.stderr, flush=True)

    def end_line(self) -> None:
        """End the progress line, so that it stays."""
        if self._on_progress_line:
            print(file=sys.stderr)
        self._on_progress_line = False


def _result(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
