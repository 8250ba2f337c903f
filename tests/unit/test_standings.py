"""Intervals cover what they say, and a difference is called one only beyond the noise."""

import numpy as np
import pytest

from orpo_ray.runs.scores import PairScores
from orpo_ray.search.standings import columns, figures, spread, verdicts

PAIRS = 200


def scored(margins: np.ndarray) -> PairScores:
    """Answers of ten tokens each, whose mean log-probs differ by the margins."""
    tokens = np.full(len(margins), 10, dtype=np.int64)
    return PairScores(10 * (margins - 2.0), np.full(len(margins), -20.0), tokens, tokens)


def drawn(rng: np.random.Generator, accuracy: float, pairs: int = PAIRS) -> PairScores:
    return scored(np.where(rng.random(pairs) < accuracy, 0.5, -0.5))


def test_means_are_over_seeds_and_pairs() -> None:
    one, two = scored(np.array([1.0, -1.0])), scored(np.array([3.0, 1.0]))
    found = figures([one, two])
    assert found["accuracy"] == pytest.approx(0.75)
    assert found["margin"] == pytest.approx(1.0)
    assert found["chosen_log_prob"] == pytest.approx(-1.0)
    assert found["rejected_log_prob"] == pytest.approx(-2.0)
    assert found["nll"] == pytest.approx(1.0)
    for name in ("margin", "chosen", "rejected", "nll"):
        value = found.get(name, found.get(f"{name}_log_prob", 0.0))
        assert found[f"{name}_low"] <= value <= found[f"{name}_high"]
    assert found["chosen_low"] < found["chosen_high"] == pytest.approx(0.0)
    assert spread([one, two])["nll"] == pytest.approx(2 / 2**0.5)
    assert spread([one, two])["accuracy"] == pytest.approx(0.5 / 2**0.5)
    assert spread([one]) == {}
    assert columns([one, two])["accuracy"].shape == (2, 2)


@pytest.mark.parametrize("accuracy", [0.6, 0.9])
def test_intervals_of_accuracy_hold_the_truth_in_95_of_100_cases(accuracy: float) -> None:
    rng = np.random.default_rng(3)
    cases = 200
    held = 0
    for _ in range(cases):
        found = figures([drawn(rng, accuracy)])
        held += found["low"] <= accuracy <= found["high"]
    assert 0.91 <= held / cases <= 0.99


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_methods_are_seldom_told_apart(seeds: int) -> None:
    rng = np.random.default_rng(4)
    cases = 60
    wrong = 0
    for _ in range(cases):
        sides = {name: [drawn(rng, 0.8) for _ in range(seeds)] for name in ("a", "b")}
        (found,) = verdicts(sides)
        wrong += found.verdict != "within noise"
    assert wrong / cases <= 0.1


def test_a_large_difference_is_told_with_its_side() -> None:
    rng = np.random.default_rng(5)
    sides = {"a": [drawn(rng, 0.9)], "b": [drawn(rng, 0.6)], "c": [drawn(rng, 0.9)]}
    found = {(each.method, each.other): each for each in verdicts(sides)}
    assert len(found) == 3
    assert found["a", "b"].verdict == "better" and found["a", "b"].low > 0
    assert found["b", "c"].verdict == "worse" and found["b", "c"].high < 0
    assert found["a", "c"].verdict == "within noise"


def test_a_seed_that_differs_is_noise() -> None:
    """The pairs alone would tell the methods apart; another seed of the first would not."""
    good, bad = scored(np.full(PAIRS, 1.0)), scored(np.full(PAIRS, -1.0))
    (found,) = verdicts({"a": [good, good, bad], "b": [bad, bad, bad]})
    assert found.difference == pytest.approx(2 / 3)
    (apart,) = verdicts({"a": [good, good, good], "b": [bad, bad, bad]})
    assert apart.verdict == "better"
    (torn,) = verdicts({"a": [good, bad], "b": [bad, good]})
    assert torn.verdict == "within noise"


def test_no_interval_is_without_width() -> None:
    same = scored(np.full(PAIRS, 1.0))
    (found,) = verdicts({"a": [same], "b": [same]})
    assert (found.low, found.high) == pytest.approx((-3 / PAIRS, 3 / PAIRS))
    assert found.verdict == "within noise"


def test_a_margin_that_a_method_inflates_decides_nothing() -> None:
    rng = np.random.default_rng(6)
    margins = rng.normal(0.3, 1.0, PAIRS)
    (found,) = verdicts({"a": [scored(margins)], "b": [scored(100 * margins)]})
    assert (found.difference, found.verdict) == (0.0, "within noise")
