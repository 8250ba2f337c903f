"""What is said and heard while something runs: lines for the user, numbers, and the wish to
stop.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orpo_ray.runs.search import Search

Announce = Callable[[str], None]
"""Says one line: `Console.announce`, for whoever needs no more of a console."""
Metrics = dict[str, float]
"""Plain numbers under `train/` and `eval/` names."""


class Console:
    """The user, as a run sees one. This one is silent; subclasses replace what they need."""

    def announce(self, line: str) -> None:
        """Say something that was decided or found."""

    def watch(self, step: int, total_steps: int, metrics: Metrics) -> None:
        """Show the numbers of a step; an evaluation comes by itself."""

    def watch_search(self, search: "Search") -> None:
        """Show a search after each change."""

    def stop_requested(self) -> bool:
        """Whether to save a checkpoint and end."""
        return False


SILENT = Console()


class Printing(Console):
    """Prints each line that is announced: what Python users get who name no console."""

    def announce(self, line: str) -> None:
        """Print it."""
        print(line, flush=True)


class Hushed(Console):
    """Says nothing, but hears the wish to stop of another console."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def stop_requested(self) -> bool:
        """Whether the other one was asked."""
        return self._console.stop_requested()
