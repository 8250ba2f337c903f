"""The progress line: redrawn on a terminal, now and then elsewhere, with the time that is left."""

import io
from contextlib import redirect_stderr

import pytest

from orpo_ray.cli.console import announce
from orpo_ray.cli.progress import ProgressLine

EVALUATION = {"eval/accuracy": 0.5, "eval/margin": -0.01, "eval/nll": 1.0}
TRAINED = {"train/loss": 0.25, "train/pairs_per_second": 32.0, "train/grad_norm": 1.0}
WIPE = "\r\x1b[K"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal with room for the whole line."""
    monkeypatch.setenv("COLUMNS", "120")


def test_training_and_held_out_figures_are_apart_and_labelled(clock: Clock) -> None:
    with redirect_stderr(io.StringIO()) as stderr:
        progress = ProgressLine(clock)
        progress(0, 400, EVALUATION)
        clock.now += 100
        progress(10, 400, TRAINED)
        progress(10, 400, EVALUATION)
        progress(11, 400, TRAINED)
        progress(11, 400, EVALUATION)
    assert stderr.getvalue().splitlines() == [
        "step 0/400  |  held out: accuracy 0.500  margin -0.010  NLL 1.000",
        "step 10/400  loss 0.2500  pairs/s 32.0  left 1:05:00",
        "  held out: accuracy 0.500  margin -0.010  NLL 1.000",
        "step 11/400  loss 0.2500  pairs/s 32.0  left 0:58:56  |  "
        "held out: accuracy 0.500  margin -0.010  NLL 1.000",
    ]


def test_elsewhere_than_on_a_terminal_lines_are_rare_but_every_evaluation_has_one(
    clock: Clock,
) -> None:
    with redirect_stderr(io.StringIO()) as stderr:
        progress = ProgressLine(clock)
        progress(0, 100, EVALUATION)
        for step in range(1, 51):
            clock.now += 1
            progress(step, 100, TRAINED)
        progress(50, 100, EVALUATION)
    steps = [line.split()[1] for line in stderr.getvalue().splitlines()]
    assert steps == ["0/100", "11/100", "22/100", "33/100", "44/100", "50/100"]
    assert "\r" not in stderr.getvalue() and "\x1b" not in stderr.getvalue()


def test_a_terminal_has_one_line_that_ends_with_the_run(clock: Clock, wide: None) -> None:
    with redirect_stderr(Terminal()) as terminal:
        progress = ProgressLine(clock)
        progress(0, 2, EVALUATION)
        for step in (1, 2):
            clock.now += 1
            progress(step, 2, TRAINED)
        assert "\n" not in terminal.getvalue()
        progress(2, 2, EVALUATION)
    drawn = terminal.getvalue()
    assert drawn.count(WIPE) == 4 and drawn.count("\n") == 1 and drawn.endswith("NLL 1.000\n")


def test_a_line_is_cut_where_it_would_wrap(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    with redirect_stderr(Terminal()) as terminal:
        ProgressLine(clock)(1, 100, {**EVALUATION, **TRAINED})
    assert len(terminal.getvalue().removeprefix(WIPE)) == 29


def test_what_is_announced_meanwhile_takes_the_place_of_the_line(clock: Clock, wide: None) -> None:
    with redirect_stderr(Terminal()) as terminal:
        ProgressLine(clock)(0, 100, EVALUATION)
        announce("stopping")
    assert terminal.getvalue().endswith(f"NLL 1.000{WIPE}stopping\n")


def test_a_resumed_run_counts_its_time_from_where_it_went_on(clock: Clock) -> None:
    with redirect_stderr(io.StringIO()) as stderr:
        progress = ProgressLine(clock)
        progress(90, 100, TRAINED)
        assert "left" not in stderr.getvalue()
        clock.now += 20
        progress(92, 100, TRAINED)
    assert stderr.getvalue().splitlines()[-1].endswith("left 0:01:20")


def test_time_lost_with_a_worker_does_not_count(clock: Clock) -> None:
    with redirect_stderr(io.StringIO()) as stderr:
        line = ProgressLine(clock)
        for step in (1, 2, 3):
            line(step, 12, TRAINED)
            clock.now += 1
        clock.now += 100  # workers start again, and resume from step 2
        for step in (3, 4):
            line(step, 12, TRAINED)
            clock.now += 20
        line(5, 12, TRAINED)
    assert stderr.getvalue().splitlines()[-1].endswith("left 0:02:20"), (
        "seven steps of twenty seconds"
    )
