"""The storage that all runs of this folder share, with pairs prepared, and what starts runs."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from forked_commands import CommandServer
from killed_runs import KilledRuns
from support import ENVIRONMENT, Done, settings

Shell = Callable[..., Done]


@pytest.fixture(scope="session")
def shell() -> Iterator[Shell]:
    """Runs `orpo-ray` in a process of its own: a fork of one that has everything imported."""
    server = CommandServer(ENVIRONMENT)

    def call(*arguments: object, environment: Mapping[str, str] = ENVIRONMENT) -> Done:
        return server.start(
            [str(argument) for argument in arguments], Path.cwd(), environment
        ).end()

    yield call
    server.close()


@pytest.fixture(scope="session")
def killed_runs() -> Iterator[KilledRuns]:
    """Trains runs that end themselves."""
    started = KilledRuns(ENVIRONMENT)
    yield started
    started.close()


@pytest.fixture(scope="session")
def prepared_storage(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage in which the pairs of `support.settings` are prepared."""
    storage = tmp_path_factory.mktemp("storage")
    config = storage / "prepare.yaml"
    config.write_text(yaml.safe_dump(settings(storage)), encoding="utf-8")
    done = shell("prepare", config)
    assert done.code == 0, done.err
    return storage
