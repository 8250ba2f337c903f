"""The line that shows how a run goes: step, speed, loss, accuracy, margin, time left."""

import shutil
import sys
import time
from collections.abc import Callable

from orpo_ray.cli.console import fresh_line

_SECONDS_BETWEEN_LINES = 10.0


def hours_minutes_seconds(seconds: float) -> str:
    """A length of time as h:mm:ss."""
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02}"


class ProgressLine:
    """Watches reported metrics; redraws one line on a terminal, elsewhere prints one now and
    then.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, float] = {}
        self._first: tuple[int, float] | None = None
        self._trained = 0
        self._printed_at = float("-inf")
        self._terminal = sys.stderr.isatty()

    def __call__(self, step: int, total_steps: int, metrics: dict[str, float]) -> None:
        """Take in one report."""
        now = self._clock()
        if step == 0:  # another stage of the run begins
            self._seen, self._first, self._trained = {}, None, 0
        self._seen |= metrics
        if "train/loss" in metrics:
            if step <= self._trained:  # workers were lost, and train again what they had not saved
                self._first = None
            self._trained = step
        if self._first is None:
            self._first = (step, now)
        evaluated = any(name.startswith("eval/") for name in metrics)
        if self._terminal:
            # A line that wraps could not be wiped.
            text = self._text(step, total_steps, now)[: shutil.get_terminal_size().columns - 1]
            print(f"{fresh_line()}{text}", end="", file=sys.stderr, flush=True)
            if step == total_steps and evaluated:
                print(file=sys.stderr)
        elif evaluated or now - self._printed_at > _SECONDS_BETWEEN_LINES:
            print(self._text(step, total_steps, now), file=sys.stderr, flush=True)
            self._printed_at = now

    def _text(self, step: int, total_steps: int, now: float) -> str:
        parts = [f"step {step}/{total_steps}"]
        for name, label, form in (
            ("train/pairs_per_second", "pairs/s", ".1f"),
            ("train/loss", "loss", ".4f"),
            ("eval/accuracy", "accuracy", ".3f"),
            ("eval/margin", "margin", ".3f"),
        ):
            if name in self._seen:
                parts.append(f"{label} {self._seen[name]:{form}}")
        left = self._seconds_left(step, total_steps, now)
        if left is not None:
            parts.append(f"left {hours_minutes_seconds(left)}")
        return "  ".join(parts)

    def _seconds_left(self, step: int, total_steps: int, now: float) -> float | None:
        assert self._first is not None
        first_step, first_time = self._first
        done = step - first_step
        return (now - first_time) / done * (total_steps - step) if done > 0 else None
