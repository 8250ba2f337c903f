"""How a run speaks to its user: lines, numbers, and the request to stop."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orpo_ray.runs.search import Search

Announce = Callable[[str], None]
"""Says one line, as `Console.announce` does. For code that needs only this method."""
Metrics = dict[str, float]
"""Plain numbers under `train/` and `eval/` names."""


class Console:
    """The user who watches a run. This class is silent; subclasses replace what they need."""

    def announce(self, line: str) -> None:
        """Say something that was decided or found."""

    def watch(self, step: int, total_steps: int, metrics: Metrics) -> None:
        """Show the numbers of a step; those of an evaluation come in a call of their own."""

    def watch_search(self, search: "Search") -> None:
        """Show a search after each change."""

    def stop_requested(self) -> bool:
        """Whether to save a checkpoint and end."""
        return False


SILENT = Console()


class Printing(Console):
    """Prints each line that is announced. It is the default of the Python functions."""

    def announce(self, line: str) -> None:
        """Print the line at once."""
        print(line, flush=True)


class Noted:
    """An `Announce` that passes lines on, and keeps them for the record."""

    def __init__(self, announce: Announce) -> None:
        self._announce = announce
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        self._announce(line)


class Hushed(Console):
    """Says nothing, but passes on another console's request to stop."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def stop_requested(self) -> bool:
        """Whether the other console asks to stop."""
        return self._console.stop_requested()
