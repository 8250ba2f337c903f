"""Which prompts are answered together, and in which order the answers are kept.

Answers are kept a window of prompts at a time. The plan depends on the prompts and the settings
alone, so that a command that goes on, or another number of workers, gives the same answers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from orpo_ray.training.sampling import Room, cut_batches

_WINDOW = 64


@dataclass(frozen=True)
class Batch:
    """Prompts of one window that one model answers together; `rows` are their numbers."""

    number: int
    window: int
    model: str
    rows: tuple[int, ...]


def plan_batches(lengths: Sequence[int], models: Sequence[str], room: Room) -> list[Batch]:
    """All batches: those of the first model, then those of the next; windows are in order."""
    plan: list[Batch] = []
    window = 0
    for model in models:
        for start in range(0, len(lengths), _WINDOW):
            own = lengths[start : start + _WINDOW]
            for numbers in cut_batches(own, room):
                rows = tuple(start + number for number in numbers)
                plan.append(Batch(len(plan), window, model, rows))
            window += 1
    return plan


def whole_windows(plan: Sequence[Batch], rows: int) -> tuple[int, int]:
    """The number of windows that the first `rows` answers fill, and how many answers these are."""
    windows = filled = 0
    for size in _sizes(plan):
        if filled + size > rows:
            break
        windows, filled = windows + 1, filled + size
    return windows, filled


def in_order(
    plan: Sequence[Batch], answered: Iterable[tuple[int, list[Any]]]
) -> Iterator[list[Any]]:
    """The answers of whole windows in the order of their prompts.

    `answered` gives the number of a batch and its answers, as they come. The plan begins with the
    window that is next.
    """
    by_number = {batch.number: batch for batch in plan}
    sizes = _sizes(plan)
    found: dict[int, dict[int, Any]] = {batch.window: {} for batch in plan}
    waiting = sorted(found)
    for number, answers in answered:
        batch = by_number[number]
        found[batch.window].update(zip(batch.rows, answers, strict=True))
        while waiting and len(found[waiting[0]]) == sizes[waiting[0] - plan[0].window]:
            whole = found.pop(waiting.pop(0))
            yield [whole[row] for row in sorted(whole)]


def _sizes(plan: Sequence[Batch]) -> list[int]:
    """The number of answers in each window."""
    sizes: dict[int, int] = {}
    for batch in plan:
        sizes[batch.window] = sizes.get(batch.window, 0) + len(batch.rows)
    return [sizes[window] for window in sorted(sizes)]
