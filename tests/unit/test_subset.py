"""Some of the training pairs are an artifact of their own, with the same held-out pairs."""

from pathlib import Path

import pytest
from support import make_artifact, run_config

from orpo_ray.data.store import Artifact, find_damage, open_artifact
from orpo_ray.data.subset import subset
from orpo_ray.errors import ConfigError
from orpo_ray.planner.lengths import find_lengths
from orpo_ray.runs.run import Run


@pytest.fixture
def whole(tmp_path: Path) -> Artifact:
    return make_artifact(tmp_path / "storage", train=40, evaluation=8)


def some(artifact: Artifact, count: int, seed: int = 1) -> Artifact:
    run = Run(run_config(artifact.path.parent.parent))
    return subset(artifact, count, seed, run.storage, lambda line: None)


def test_it_has_so_many_of_the_pairs_and_all_that_are_held_out(whole: Artifact) -> None:
    part = some(whole, 10)
    assert len(part.train) == part.summary.train == 10
    assert len(set(part.train.pair_ids)) == 10 and set(part.train.pair_ids) <= set(
        whole.train.pair_ids
    )
    assert part.eval.pair_ids == whole.eval.pair_ids
    by_id = {pair.pair_id: pair for pair in whole.train}
    for pair in part.train:
        own = by_id[pair.pair_id]
        assert pair.prompt.tolist() == own.prompt.tolist()
        assert pair.rejected.tolist() == own.rejected.tolist()
        assert pair.trained.chosen.tolist() == own.trained.chosen.tolist()
    assert find_damage(part.path, part.summary.hash) is None


def test_fewer_are_among_more_and_the_seed_draws_them(whole: Artifact) -> None:
    few, more = (set(some(whole, count).train.pair_ids) for count in (10, 20))
    assert few < more
    assert set(some(whole, 10, seed=2).train.pair_ids) != few


def test_it_is_found_again_and_has_a_hash_of_its_own(whole: Artifact) -> None:
    one, again = some(whole, 10), some(whole, 10)
    assert one.path == again.path != whole.path
    assert len({one.summary.hash, some(whole, 11).summary.hash, whole.summary.hash}) == 3
    assert open_artifact(one.path).train.pair_ids == one.train.pair_ids


def test_all_of_them_are_the_whole_and_more_are_refused(whole: Artifact) -> None:
    assert some(whole, 40) is whole
    with pytest.raises(ConfigError, match="41 training pairs are asked for, and there are 40"):
        some(whole, 41)


def test_it_stays_whole_when_the_other_is_deleted(whole: Artifact) -> None:
    part = some(whole, 10)
    for path in whole.path.iterdir():
        path.unlink()
    assert find_damage(part.path, part.summary.hash) is None


def test_a_plan_does_not_take_it_for_the_prepared_pairs(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    from orpo_ray.api import prepare

    artifact = prepare(config)
    run = Run(config)
    subset(artifact, 9, 1, run.storage, lambda line: None)
    assert find_lengths(config).pairs == len(artifact.train) > 9
