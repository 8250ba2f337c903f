"""Broken answers are told from good ones, and an answer's nearness to the chosen one is counted."""

import pytest

from orpo_ray.evaluation.broken import nearness, vocabulary, why_broken, words_of

KNOWN = vocabulary(["Please bring the red book, thank you.", "Here is the blue cup!"])


@pytest.mark.parametrize(
    ("text", "is_cut", "why"),
    [
        ("Here is the red book, thank you.", False, None),
        ("Here is the red book, thank you.", True, "endless"),
        ("", False, "empty"),
        ("   ", False, "empty"),
        ("the red cup " * 8, False, "repeats"),
        ("the the the", False, None),  # too short to repeat itself
        ("zxq vvk pll the", False, "foreign"),
        ("Here is the zxq", False, None),
    ],
)
def test_why_an_answer_is_broken(text: str, is_cut: bool, why: str | None) -> None:
    assert why_broken(text, KNOWN, is_cut=is_cut) == why


def test_words_are_without_case_and_marks_count() -> None:
    assert words_of("Thank YOU, été!") == ["thank", "you", ",", "été", "!"]


def test_nearness_is_the_difference_of_two_f1() -> None:
    """Two of three words are the chosen answer's, one is the rejected one's."""
    assert nearness("a b c", "a b d", "c x y") == pytest.approx(4 / 6 - 2 / 6)
    assert nearness("", "a", "b") == 0
    assert nearness("a a", "a", "b") == pytest.approx(2 / 3), "a word counts as often as it stands"
