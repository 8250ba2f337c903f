"""The progress and the result of a search, as tables."""

import shlex
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orpo_ray.cli.progress import hours_minutes_seconds
from orpo_ray.runs.search import Found, Search, Trial
from orpo_ray.search.outcome import shown_values, trial_steps

_STATES = {"running": "running", "finished": "finished", "stopped": "given up", "failed": "failed"}
_COLUMNS = ("eval/accuracy", "eval/margin", "eval/nll")
_LINES_BESIDE_ROWS = 7


class SearchTable:
    """Shows a search: on a terminal a table that is redrawn, elsewhere a line for each event."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._console = Console(stderr=True)
        self._live = (
            Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        )
        self._printed: dict[int, tuple[str, float]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, search: Search) -> None:
        """Show what has changed."""
        if self._live is not None:
            self._live.start()
            rows = max(1, self._console.height - _LINES_BESIDE_ROWS)
            self._live.update(
                Group(table_of(search, rows), Text(_counts(search, self._clock()))), refresh=True
            )
            return
        for trial in search.trials:
            news = (trial.state, trial.last.get("step", -1.0))
            if self._printed.get(trial.number, ("", -1.0)) != news:
                self._printed[trial.number] = news
                print(
                    f"{_line(trial)}  [{_counts(search, self._clock())}]",
                    file=sys.stderr,
                    flush=True,
                )


def _counts(search: Search, now: float) -> str:
    """How many trials are done, and how long the rest will take."""
    done = sum(trial.state != "running" for trial in search.trials)
    left = f"{done} of {max(search.trial_count, len(search.trials))} trials done"
    seconds = _seconds_left(search, now)
    return left if seconds is None else f"{left}, time left about {hours_minutes_seconds(seconds)}"


def _seconds_left(search: Search, now: float) -> float | None:
    """The seconds that the remaining trials will take; None until one has finished.

    It is computed from the steps since the command started, and from the mean steps of a trial.
    """
    ended = [trial for trial in search.trials if trial.state in ("finished", "stopped")]
    if search.began is None or not any(trial.state == "finished" for trial in ended):
        return None
    steps = trial_steps(search.trials) - search.began.steps
    if steps <= 0:
        return None
    mean = sum(trial.steps for trial in ended) / len(ended)
    running = [trial for trial in search.trials if trial.state == "running"]
    to_begin = max(0, search.trial_count - len(search.trials))
    steps_left = sum(_steps_left(trial, mean) for trial in running) + mean * to_begin
    seconds_a_step = (now - search.began.at) / steps
    return steps_left * seconds_a_step


def _steps_left(trial: Trial, mean: float) -> float:
    """A guess, from the mean steps of trials that have ended."""
    if trial.steps < mean:
        return mean - trial.steps
    # A trial past the mean was not given up, so it will probably run to its end.
    return trial.total_steps - trial.steps


def table_of(search: Search, rows: int | None = None) -> Table:
    """A table with a row for each trial.

    If there is room for `rows` only, it has the running trials and the last ones that ended.
    """
    fields = list(dict.fromkeys(name for trial in search.trials for name in trial.values))
    table = Table(title=f"{search.name}: {search.status}", title_justify="left")
    table.add_column("trial", justify="right")
    for name in _short(fields):
        table.add_column(name.replace("_", " "), justify="right")
    for name in ("step", *(column.removeprefix("eval/") for column in _COLUMNS)):
        table.add_column(name, justify="right")
    table.add_column("state")
    for trial in _shown(search.trials, rows):
        numbers = [
            f"{trial.last[name]:.3f}" if trial.last.get(name) is not None else ""
            for name in _COLUMNS
        ]
        marked = (
            "bold" if search.outcome is not None and trial.number == search.outcome.best else ""
        )
        values = [shown_values({name: trial.values[name]}).partition("=")[2] for name in fields]
        step = f"{trial.steps}/{trial.total_steps}" if trial.total_steps else ""
        table.add_row(
            str(trial.number), *values, step, *numbers, _STATES[trial.state], style=marked
        )
    return table


def _shown(trials: list[Trial], rows: int | None) -> list[Trial]:
    if rows is None or len(trials) <= rows:
        return trials
    # The running trials and the latest ended ones; then by number.
    running_last = sorted(trials, key=lambda trial: trial.state == "running")
    return sorted(running_last[-rows:], key=lambda trial: trial.number)


def _short(fields: list[str]) -> list[str]:
    """Names without their sections, unless two of them would be the same."""
    bare = [name.rpartition(".")[2] for name in fields]
    return bare if len(set(bare)) == len(bare) else fields


def print_search(search: Search, console: Console | None = None) -> None:
    """Print the table and, if the search has ended, what it found."""
    console = console or Console()
    console.print(table_of(search))
    if search.status == "running":
        console.print(_counts(search, time.time()))
    for trial in search.trials:
        if trial.error:
            console.print(Text(f"trial {trial.number} failed: {trial.error}"))
    if search.outcome:
        _print_outcome(search.outcome, bool(search.settings.get("try_given")), console)
    if search.report:
        console.print(f"report:  {search.report}", soft_wrap=True)


def _print_outcome(outcome: Found, tries_given: bool, console: Console) -> None:
    """Print what a search found. `tries_given`: its trial 0 is the given configuration."""
    table = Table(
        title="Pareto front: trials that no other beats in both accuracy and NLL",
        title_justify="left",
    )
    for column in ("trial", "accuracy", "NLL of chosen", "margin", "values"):
        table.add_column(column, justify="left" if column == "values" else "right", overflow="fold")
    for point in outcome.pareto:
        numbers = (f"{point[name]:.3f}" for name in ("accuracy", "nll", "margin"))
        table.add_row(str(point["trial"]), *numbers, shown_values(point["values"]))
    console.print(table)
    for sample in outcome.answers:
        console.print(Text(sample["prompt"], style="bold"))
        for who, text in sample.items():
            if who != "prompt":
                console.print(Text(f"  {who}: {text}"))
    for line in outcome.reading:
        console.print(Text(line))
    console.print(f"config:  {outcome.config}\nadapter: {outcome.adapter}", soft_wrap=True)
    if outcome.best != 0 or not tries_given:
        console.print(f"next:    orpo-ray train {shlex.quote(outcome.config)}", soft_wrap=True)


def _line(trial: Trial) -> str:
    parts = [f"trial {trial.number}: {shown_values(trial.values)}"]
    if trial.total_steps:
        parts.append(f"step {trial.steps}/{trial.total_steps}")
    found = [(name.removeprefix("eval/"), trial.last.get(name)) for name in _COLUMNS]
    parts += [f"{name} {value:.3f}" for name, value in found if value is not None]
    return "  ".join([*parts, _STATES[trial.state]])
