"""What a trial reports to Tune when it ends."""

from collections.abc import Callable
from typing import Any

import pytest

from orpo_ray.errors import ConfigError, ResourceError
from orpo_ray.runs.files import LOG_FILE
from orpo_ray.search import trial


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(trial.tune, "report", made.append)
    return made


class Logged:
    """Stands for a trial's run. Its log is a list, and storing it makes a copy."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.stored: list[str] = []

    def store(self, name: str) -> None:
        assert name == LOG_FILE
        self.stored = list(self.log)


def run(monkeypatch: pytest.MonkeyPatch, ending: Callable[..., None]) -> Logged:
    logged = Logged()
    monkeypatch.setattr(trial, "_open", lambda *_: logged)
    monkeypatch.setattr(trial, "_train", ending)
    monkeypatch.setattr(trial._log, "error", lambda line, **_: logged.log.append(line))
    trial.run_trial({}, None)  # type: ignore[arg-type]
    return logged


def raises(error: BaseException) -> Callable[..., None]:
    def end(*_: Any) -> None:
        raise error

    return end


def test_a_trial_that_ends_says_so(
    monkeypatch: pytest.MonkeyPatch, reports: list[dict[str, Any]]
) -> None:
    run(monkeypatch, lambda *_: None)
    assert reports == [{"finished": True}]


@pytest.mark.parametrize(
    ("error", "message", "may_pass"),
    [
        (ConfigError("adapter.r: 0"), "adapter.r: 0", False),
        (ResourceError("no room"), "no room", True),
        (OSError("disk\nfull"), "unexpected OSError: disk full", True),
        (KeyError("x"), "unexpected KeyError: 'x'", False),
    ],
)
def test_an_error_is_reported_with_whether_it_may_pass(
    monkeypatch: pytest.MonkeyPatch,
    reports: list[dict[str, Any]],
    error: Exception,
    message: str,
    may_pass: bool,
) -> None:
    logged = run(monkeypatch, raises(error))
    assert reports == [{"error": message, "may_pass": may_pass}]
    assert logged.stored == ["the trial failed"], "the traceback is logged before the log is stored"


def test_a_trial_that_cannot_begin_says_so(
    monkeypatch: pytest.MonkeyPatch, reports: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(trial, "_open", raises(ConfigError("adapter.r: 0")))
    trial.run_trial({}, None)  # type: ignore[arg-type]
    assert reports == [{"error": "adapter.r: 0", "may_pass": False}]


def test_a_trial_that_is_given_up_reports_nothing_even_if_its_end_fails(
    monkeypatch: pytest.MonkeyPatch, reports: list[dict[str, Any]]
) -> None:
    """The report would wait for Tune for ever, and the process could not take another trial."""

    def leave(*_: Any) -> None:
        try:
            try:
                raise SystemExit(0)
            finally:
                raise OSError("the log cannot be stored")
        finally:
            raise ValueError("nor can the lock be left")

    run(monkeypatch, leave)
    assert reports == []


def test_a_trial_that_is_given_up_ends(
    monkeypatch: pytest.MonkeyPatch, reports: list[dict[str, Any]]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, raises(SystemExit(0)))
    assert reports == []
