"""A run is judged on pairs that it has not trained, also if another seed would hold out others."""

from pathlib import Path
from typing import Any

import pytest
from support import Listener, make_artifact, run_config

from orpo_ray.api import ground
from orpo_ray.config import RunConfig, build, dump
from orpo_ray.data.store import Artifact
from orpo_ray.runs.run import Run


def drawn_by_seed(storage: Path, **data: Any) -> RunConfig:
    tree = dump(run_config(storage))
    tree["data"] |= {"eval": [], "eval_fraction": 0.2, **data}
    return build(RunConfig, tree, {(): "tests"})


def trained(config: RunConfig, artifact: Artifact) -> Run:
    """Leave what a run leaves that was trained with these pairs."""
    run = Run(config)
    run.path("checkpoints/step-000002").mkdir(parents=True)
    run.write_config()
    run.write_facts({"identity": {"data": artifact.summary.hash}})
    return run


@pytest.fixture
def own(tmp_path: Path) -> Artifact:
    return make_artifact(tmp_path / "storage", train=8, evaluation=4)


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """What the run's own seed would draw."""
    drawn = make_artifact(tmp_path / "storage", train=9, evaluation=3)
    monkeypatch.setattr(ground, "prepare_run", lambda *_: drawn)
    return drawn


def judged(run: Run) -> tuple[Artifact, list[str]]:
    console = Listener()
    return ground.judged_pairs(run, console), console.said


def test_the_pairs_that_a_run_was_trained_with_judge_it(
    tmp_path: Path, own: Artifact, other: Artifact
) -> None:
    found, said = judged(trained(drawn_by_seed(tmp_path / "storage"), own))
    assert found.summary.hash == own.summary.hash
    assert said == [f"the held-out pairs are those of the run itself, in {own.path}"]


def test_pairs_that_are_gone_are_told(tmp_path: Path, own: Artifact, other: Artifact) -> None:
    run = trained(drawn_by_seed(tmp_path / "storage"), own)
    (own.path / "artifact.json").unlink()
    found, (said,) = judged(run)
    assert found is other and "may have trained some" in said


def test_named_pairs_and_another_source_are_those_that_were_asked_for(
    tmp_path: Path, own: Artifact, other: Artifact
) -> None:
    config = drawn_by_seed(tmp_path / "storage")
    trained(config, own)
    for asked in (
        run_config(tmp_path / "storage"),
        drawn_by_seed(tmp_path / "storage", max_length=90),
    ):
        assert judged(Run(asked)) == (other, [])


def test_a_run_that_was_never_trained_has_what_its_seed_draws(
    tmp_path: Path, other: Artifact
) -> None:
    assert judged(Run(drawn_by_seed(tmp_path / "storage"))) == (other, [])
