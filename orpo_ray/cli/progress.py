"""The progress of a run in lines: training figures, held-out figures and the time left."""

import shutil
import sys
import time
from collections.abc import Callable

from orpo_ray.cli.console import fresh_line

_SECONDS_BETWEEN_LINES = 10.0
_TRAINING = (("train/loss", "loss", ".4f"), ("train/pairs_per_second", "pairs/s", ".1f"))
_HELD_OUT = (
    ("eval/accuracy", "accuracy", ".3f"),
    ("eval/margin", "margin", ".3f"),
    ("eval/nll", "NLL", ".3f"),
)
_UNDER_THE_STEP = "  "


def hours_minutes_seconds(seconds: float) -> str:
    """A length of time as h:mm:ss."""
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02}"


class ProgressLine:
    """Shows reported metrics.

    On a terminal it redraws one line. Elsewhere it prints a line every ten seconds, and one for
    every evaluation. No step is shown twice.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._training: dict[str, float] = {}
        self._held_out = ""
        self._first: tuple[int, float] | None = None
        self._trained = 0
        self._printed_at = float("-inf")
        self._printed_step = -1
        self._terminal = sys.stderr.isatty()

    def __call__(self, step: int, total_steps: int, metrics: dict[str, float]) -> None:
        """Take in one report: the figures of a step, or those of an evaluation after it."""
        now = self._clock()
        if step == 0:  # another stage of the run begins
            self._training, self._first, self._trained = {}, None, 0
        if "train/loss" in metrics:
            # After a loss of workers, new workers repeat the steps after the checkpoint.
            if step <= self._trained:
                self._first = None
            self._training, self._trained = metrics, step
        if self._first is None:
            self._first = (step, now)
        evaluated = any(name.startswith("eval/") for name in metrics)
        if evaluated:
            self._held_out = f"held out: {_figures(metrics, _HELD_OUT)}"
        text = self._step(step, total_steps, now)
        if self._terminal:
            self._redraw(f"{text}  |  {self._held_out}" if self._held_out else text)
            if step == total_steps and evaluated:
                print(file=sys.stderr)
        elif evaluated:
            shown = _UNDER_THE_STEP if step == self._printed_step else f"{text}  |  "
            self._print(step, shown + self._held_out, now)
        elif now - self._printed_at > _SECONDS_BETWEEN_LINES:
            self._print(step, text, now)

    def _redraw(self, text: str) -> None:
        # A line that wraps cannot be wiped.
        shown = text[: shutil.get_terminal_size().columns - 1]
        print(f"{fresh_line()}{shown}", end="", file=sys.stderr, flush=True)

    def _print(self, step: int, text: str, now: float) -> None:
        print(text, file=sys.stderr, flush=True)
        self._printed_at, self._printed_step = now, step

    def _step(self, step: int, total_steps: int, now: float) -> str:
        """The step, its training figures if there are any, and the time left."""
        parts = [f"step {step}/{total_steps}"]
        if step and self._training:
            parts.append(_figures(self._training, _TRAINING))
        left = self._seconds_left(step, total_steps, now)
        if left is not None:
            parts.append(f"left {hours_minutes_seconds(left)}")
        return "  ".join(parts)

    def _seconds_left(self, step: int, total_steps: int, now: float) -> float | None:
        assert self._first is not None
        first_step, first_time = self._first
        done = step - first_step
        return (now - first_time) / done * (total_steps - step) if done > 0 else None


def _figures(metrics: dict[str, float], shown: tuple[tuple[str, str, str], ...]) -> str:
    return "  ".join(
        f"{label} {metrics[name]:{form}}" for name, label, form in shown if name in metrics
    )
