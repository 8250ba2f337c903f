"""Prepared pairs that every test of this folder may train on."""

import pytest
from support import make_artifact

from orpo_ray.data.store import Artifact


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """36 training and 8 evaluation pairs of the demo."""
    return make_artifact(tmp_path_factory.mktemp("prepared"))
