"""Prepared pairs for every test of this folder, and what runs of several workers share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import EVAL, TRAIN, Lab, MakeLab
from ranks import Ranks
from support import BASE, demo_pairs, make_artifact, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_ray.data.store import Artifact


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """36 training and 8 evaluation pairs of the demo."""
    return make_artifact(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lower half of the demo's base. It trains twice as fast, and sums must agree as well."""
    folder = tmp_path_factory.mktemp("base")
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_pairs(
        tmp_path_factory.mktemp("prepared"), demo_pairs("train", TRAIN), demo_pairs("h1", EVAL)
    )


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    started = Ranks()
    yield started
    started.close()


@pytest.fixture(scope="module")
def make_lab(
    ranks: Ranks, base: Path, prepared: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> MakeLab:
    def make(base: Path = base, artifact: Artifact = prepared) -> Lab:
        return Lab(ranks, tmp_path_factory.mktemp("runs"), base, artifact)

    return make
