"""The command line as a person uses it.

It runs in this process if that is enough, and as a real process if a test needs one.
"""

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Done
from terminal import Command, Finished, fresh_shell, write_config

from orpo_ray.cli.main import run

# Typer colours its help on some build servers, terminal or not; it looks once, when it is imported.
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, no colours and a page of one width, whatever the machine has."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture
def command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> Iterator[Command]:
    """Runs `orpo-ray` with the given arguments in this process."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    root = logging.getLogger()
    handlers = list(root.handlers)

    def call(*arguments: object) -> Done:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        return Done(code, *capfd.readouterr())

    yield call
    logging.captureWarnings(False)
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
        handler.close()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run started by the real command. Tests read it, and share its prepared pairs."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder)
    done = fresh_shell("train", config, "--json")
    assert done.code == 0, done.err
    return Finished(config, folder / "storage" / "tiny", done)


@pytest.fixture
def config(finished: Finished, tmp_path: Path) -> Path:
    """The same settings with a storage of their own, in which the pairs are prepared already."""
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "artifacts").symlink_to(finished.run_dir.parent / "artifacts")
    return write_config(tmp_path)
