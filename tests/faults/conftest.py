"""The storage that all runs of this folder share, with their pairs prepared once by the real command."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import ENVIRONMENT, settings


@pytest.fixture(scope="session")
def prepared_storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage in which the pairs of `support.settings` are prepared: Ray runs here, and in a process that ends."""
    storage = tmp_path_factory.mktemp("storage")
    config = storage / "prepare.yaml"
    config.write_text(yaml.safe_dump(settings(storage)), encoding="utf-8")
    command = [sys.executable, "-m", "orpo_ray.cli.main", "prepare", str(config)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return storage
