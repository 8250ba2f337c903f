"""Checks of rows: each defect has its own reason, and every reason is a sentence."""

import re
from pathlib import Path

import pytest
from text_pairs import text_pair

import orpo_ray.data
from orpo_ray.data.checks import REASONS, check_pair, explain
from orpo_ray.data.pairs import Message, Pair, Refusal

ASKED: list[Message] = [{"role": "user", "content": "Q"}]


def test_a_good_pair_passes() -> None:
    assert check_pair(text_pair(ASKED, "good", "bad")) is None


def turns(roles: str) -> list[Message]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[role], "content": role} for role in roles]


@pytest.mark.parametrize("roles", ["u", "su", "uau", "suau", "uu", "uuau"])
def test_orders_of_roles_that_are_conversations(roles: str) -> None:
    assert check_pair(text_pair(turns(roles), "good", "bad")) is None


@pytest.mark.parametrize(
    ("roles", "detail"),
    [
        ("au", "an assistant turn comes before the first user turn"),
        ("sau", "an assistant turn comes before the first user turn"),
        ("uaau", "an assistant turn directly follows another one"),
        ("usu", "a system turn is not the first"),
        ("ssu", "a system turn is not the first"),
    ],
)
def test_orders_of_roles_that_are_none(roles: str, detail: str) -> None:
    assert check_pair(text_pair(turns(roles), "good", "bad")) == Refusal("wrong-roles", detail)


@pytest.mark.parametrize(
    ("pair", "code"),
    [
        (text_pair([], "a", "b"), "missing-prompt"),
        (text_pair([{"role": "user", "content": " \n"}], "a", "b"), "missing-prompt"),
        (
            text_pair(
                [{"role": "system", "content": "S"}, {"role": "user", "content": ""}], "a", "b"
            ),
            "missing-prompt",
        ),
        (text_pair([{"role": "system", "content": "S"}], "a", "b"), "wrong-roles"),
        (text_pair([*ASKED, {"role": "assistant", "content": "A"}], "a", "b"), "wrong-roles"),
        (text_pair(ASKED, "", "b"), "empty-chosen"),
        (text_pair(ASKED, "a", "\n \t"), "empty-rejected"),
        (text_pair(ASKED, "same", " same\n"), "identical"),
        (text_pair(ASKED, "half \ud83d here", "b"), "invalid-utf8"),
        (text_pair([{"role": "user", "content": "\udcff"}], "a", "b"), "invalid-utf8"),
    ],
)
def test_each_defect_has_its_reason(pair: Pair, code: str) -> None:
    found = check_pair(pair)
    assert found is not None
    assert found.code == code


def test_every_code_used_in_the_room_is_in_the_table() -> None:
    used: set[str] = set()
    for file in Path(orpo_ray.data.__path__[0]).glob("*.py"):
        used.update(re.findall(r'(?:Refusal|RowRefused)\("([a-z-]+)"', file.read_text()))
    assert "different-prompts" in used
    assert used <= set(REASONS)


def test_a_reason_reads_with_its_detail() -> None:
    assert explain(Refusal("identical")) == "chosen and rejected are the same"
    assert explain(Refusal("images", "column images")).endswith("reads text only: column images")
