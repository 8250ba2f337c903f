"""Intervals over held-out pairs against textbook formulas; and scores that come back from disk."""

import math
from pathlib import Path

import numpy as np
import pytest

from orpo_ray.config.objectives.dpo import DpoConfig
from orpo_ray.config.objectives.orpo import OrpoConfig
from orpo_ray.config.objectives.simpo import SimpoConfig
from orpo_ray.errors import ConfigError
from orpo_ray.runs.scores import (
    INTERVAL_METRICS,
    PairScores,
    changes,
    intervals,
    read_scores,
    scores_file,
    smallest_visible,
    write_scores,
)
from orpo_ray.runs.summary import on_preference, remarks


def made_up(count: int, gain: float = 0.0, seed: int = 0) -> PairScores:
    """Scores of answers of 2 to 20 tokens; `gain`: nats a token by which chosen answers are
    likelier.
    """
    generator = np.random.default_rng(seed)
    tokens = generator.integers(2, 21, size=(2, count))
    means = -1.0 + 0.3 * generator.standard_normal((2, count))
    means[0] += gain
    return PairScores(means[0] * tokens[0], means[1] * tokens[1], tokens[0], tokens[1])


def test_the_interval_of_a_share_is_that_of_the_normal_approximation() -> None:
    scores = made_up(400, gain=0.2)
    share = float(
        np.mean(scores.chosen / scores.chosen_tokens > scores.rejected / scores.rejected_tokens)
    )
    mean = changes(scores, scores)["accuracy"].before
    low, high = mean.low, mean.high
    assert mean.value == pytest.approx(share)
    half = 1.96 * math.sqrt(share * (1 - share) / 400)
    assert low == pytest.approx(share - half, abs=0.01)
    assert high == pytest.approx(share + half, abs=0.01)


def test_every_interval_holds_its_mean_and_shrinks_with_pairs() -> None:
    few, many = made_up(100, 0.1), made_up(1600, 0.1)
    for name in INTERVAL_METRICS:
        widths = []
        for scores in (few, many):
            mean = changes(scores, scores)[name].after
            assert mean.low < mean.value < mean.high
            widths.append(mean.high - mean.low)
        assert widths[0] / widths[1] == pytest.approx(4, rel=0.3)


def test_one_evaluation_has_the_intervals_of_a_comparison() -> None:
    scores = made_up(40)
    compared = changes(scores, scores)
    assert intervals(scores) == {name: change.before for name, change in compared.items()}


def test_nll_is_per_token_over_all_pairs() -> None:
    scores = PairScores(
        *(np.array(column) for column in ([-2.0, -30.0], [-1.0, -1.0], [2, 10], [1, 1]))
    )
    assert changes(scores, scores)["nll"].before.value == pytest.approx(32 / 12)


def test_a_change_on_the_same_pairs_is_surer_than_two_intervals() -> None:
    """Every pair gains the same: the interval of the gain has no width, those of the means have."""
    before = made_up(200)
    after = PairScores(
        before.chosen + 0.05 * before.chosen_tokens,
        before.rejected,
        before.chosen_tokens,
        before.rejected_tokens,
    )
    gained = changes(before, after)["margin"]
    assert vars(gained.difference) == pytest.approx({"value": 0.05, "low": 0.05, "high": 0.05})
    assert not gained.is_noise
    assert gained.before.high - gained.before.low > 0.05


def test_two_models_that_differ_by_chance_differ_by_noise() -> None:
    assert changes(made_up(64, seed=1), made_up(64, seed=2))["accuracy"].is_noise
    assert not changes(made_up(2000, seed=1), made_up(2000, gain=0.3, seed=2))["accuracy"].is_noise


def test_six_pairs_of_one_way_are_the_first_that_chance_does_not_explain() -> None:
    def chance(turned: int) -> float:
        return 2.0 * 0.5**turned

    assert chance(6) < 0.05 <= chance(5)
    assert smallest_visible(120) == pytest.approx(6 / 120)
    assert smallest_visible(3) == 1.0


def test_scores_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = scores_file(tmp_path / "evaluations", 12)
    assert read_scores(path) is None
    scores = made_up(7)
    write_scores(path, scores)
    found = read_scores(path)
    assert found is not None
    for name in vars(scores):
        assert np.array_equal(getattr(found, name), getattr(scores, name))
    assert [file.name for file in path.parent.iterdir()] == ["step-00000012.safetensors"]


def test_a_damaged_file_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.safetensors"
    path.write_bytes(b"half a file")
    with pytest.raises(ConfigError, match=r"step-00000001\.safetensors: not as the run wrote it"):
        read_scores(path)


def turned(gained: int, lost: int, count: int) -> tuple[PairScores, PairScores]:
    """Two evaluations of one-token answers in which so many pairs turn to each side."""
    ones = np.ones(count, dtype=np.int64)
    before, after = np.full(count, 0.1), np.full(count, 0.1)
    before[:gained], after[gained : gained + lost] = -0.1, -0.1
    nothing = np.zeros(count)
    return PairScores(before, nothing, ones, ones), PairScores(after, nothing, ones, ones)


@pytest.mark.parametrize(
    ("gained", "lost", "chance", "is_noise"),
    [
        (3, 0, 2 / 8, True),
        (5, 0, 2 / 32, True),
        (6, 0, 2 / 64, False),
        (7, 1, 2 * 9 / 256, True),
        (8, 1, 2 * 10 / 512, False),
    ],
)
def test_few_pairs_that_turn_are_noise_whatever_the_interval_says(
    gained: int, lost: int, chance: float, is_noise: bool
) -> None:
    found = changes(*turned(gained, lost, 10))["accuracy"]
    assert found.chance == pytest.approx(chance)
    assert found.is_noise is is_noise


def test_a_good_model_that_got_worse_is_not_called_a_good_one() -> None:
    pairs = 40
    lines = {lost: remarks(changes(*turned(0, lost, pairs)), pairs)[0] for lost in (0, 11)}
    assert lines[0].endswith("little was left to learn.")
    assert lines[11].startswith("The model got worse (1.000 to 0.725 of 40 held-out pairs)")


def test_no_pair_that_turns_is_no_sure_zero() -> None:
    """The rule of three at none of ten, where a bootstrap draws none of ten each time."""
    found = changes(*turned(0, 0, 10))["accuracy"]
    assert vars(found.difference) == pytest.approx({"value": 0.0, "low": -0.3, "high": 0.3})


def test_all_pairs_that_turn_are_no_sure_one() -> None:
    found = changes(*turned(10, 0, 10))["accuracy"]
    assert vars(found.difference) == pytest.approx({"value": 1.0, "low": 0.7, "high": 1.0})


def test_all_of_few_pairs_are_not_all_pairs() -> None:
    """The rule of three at ten of ten, where a bootstrap draws ten of ten each time."""
    found = changes(*turned(0, 0, 10))["accuracy"]
    assert vars(found.after) == pytest.approx({"value": 1.0, "low": 0.7, "high": 1.0})


def test_a_negligible_preference_term_is_named_with_what_changes_it() -> None:
    advice = OrpoConfig().more_preference
    assert on_preference([0.02, 0.04], advice) == [
        "The preference term was 3.0 % of the loss, so the run mostly learnt to write the chosen "
        "answers: raise objective.lambda, or run orpo-ray tune."
    ]
    assert on_preference([0.2, 0.04], advice) == on_preference([], advice) == []
    assert on_preference([0.0], DpoConfig().more_preference) != []
    assert on_preference([0.0], SimpoConfig().more_preference) == []
