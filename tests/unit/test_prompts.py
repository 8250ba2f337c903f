"""Prompts of files: any row that asks something, with answers or without."""

import json
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.data.pairs import Refusal
from orpo_ray.data.prompts import prompt_of, read_prompts
from orpo_ray.errors import DataError

ASKS = [{"role": "user", "content": "Why?"}]
SYSTEM = {"role": "system", "content": "Be brief."}
SAYS = {"role": "assistant", "content": "So."}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]

ROWS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "a prompt alone": ({"prompt": "Why?"}, ASKS),
    "a prompt and its number": ({"id": 3, "prompt": "Why?", "source": "x"}, ASKS),
    "a question": ({"question": "Why?"}, ASKS),
    "messages": ({"messages": ASKS}, ASKS),
    "messages with an answer": ({"messages": [*ASKS, SAYS]}, ASKS),
    "messages with several turns": ({"messages": [*ASKS, SAYS, *ASKS]}, [*ASKS, SAYS, *ASKS]),
    "messages as JSON text": ({"messages": json.dumps(ASKS)}, ASKS),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "Why?"}]}, ASKS),
    "a pair": ({"prompt": "Why?", "chosen": "a", "rejected": "b"}, ASKS),
    "a pair of conversations": (
        {"chosen": [*ASKS, SAYS], "rejected": [*ASKS, {**SAYS, "content": "No."}]},
        ASKS,
    ),
    "one answer": ({"prompt": "Why?", "completion": "a"}, ASKS),
    "one answer and a label": ({"prompt": "Why?", "completion": "a", "label": True}, ASKS),
    "AlpacaEval": ({"dataset": "helpful_base", "instruction": "Why?", "output": "a"}, ASKS),
    "Alpaca with input": (
        {"instruction": "Why?", "input": "x"},
        [{"role": "user", "content": "Why?\n\nx"}],
    ),
    "a system column": ({"system": "Be brief.", "prompt": "Why?"}, [SYSTEM, *ASKS]),
    "HH": ({"prompt": "\n\nHuman: Why?\n\nAssistant:"}, ASKS),
}


@pytest.mark.parametrize(("row", "asked"), ROWS.values(), ids=ROWS)
def test_a_row_asks_what_it_asks_a_model_in_training(row: dict[str, Any], asked: list[Any]) -> None:
    found = prompt_of(row)
    assert not isinstance(found, Refusal), found
    assert (found.messages, found.later, found.row) == (asked, [], row)


def test_questions_of_mt_bench_come_one_after_the_other() -> None:
    found = prompt_of({"question_id": 81, "category": "writing", "turns": ["Why?", "And?"]})
    assert not isinstance(found, Refusal)
    assert (found.messages, found.later) == (ASKS, ["And?"])


def test_questions_come_with_their_system_turn_and_tools() -> None:
    found = prompt_of({"turns": ["Why?", "And?"], "system": "Be brief.", "tools": TOOLS})
    assert not isinstance(found, Refusal)
    assert (found.messages, found.context) == ([SYSTEM, *ASKS], {"tools": TOOLS})
    found = prompt_of({"prompt": "Why?", "turns": [{"role": "user", "content": "Who?"}]})
    assert not isinstance(found, Refusal) and found.messages == ASKS


def test_tools_come_with_the_prompt() -> None:
    found = prompt_of({"messages": ASKS, "tools": TOOLS})
    assert not isinstance(found, Refusal)
    assert found.context == {"tools": TOOLS}


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"text": "Why?"}, "unknown-shape"),
        ({"question": "Why?", "query": "Who?"}, "unknown-shape"),
        ({"prompt": " "}, "missing-prompt"),
        ({"prompt": ""}, "missing-prompt"),
        ({"messages": [SAYS]}, "missing-prompt"),
        ({"messages": [SAYS, *ASKS]}, "wrong-roles"),
        ({"messages": [{"role": "judge", "content": "Why?"}]}, "wrong-roles"),
        ({"turns": ["Why?", 3]}, "wrong-type"),
        ({"turns": [" "]}, "wrong-type"),
        ({"prompt": "Why?", "images": ["a.png"]}, "images"),
        ({"prompt": "\ud800"}, "invalid-utf8"),
        ({"turns": ["\ud800"]}, "invalid-utf8"),
        ({"turns": ["Why?", "\ud800"]}, "invalid-utf8"),
        ({"prompt": 3}, "wrong-type"),
    ],
)
def test_a_row_that_asks_nothing_is_refused(row: dict[str, Any], code: str) -> None:
    found = prompt_of(row)
    assert isinstance(found, Refusal) and found.code == code, found


def test_a_text_file_has_a_prompt_on_each_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffWhy?\r\n\n  What is \u2028 this?  \n".encode())
    assert [one.messages[0]["content"] for one in read_prompts(str(file))] == [
        "Why?",
        "What is \u2028 this?",
    ]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"", "no prompts in it"),
        (
            "a.txt",
            b"a\n\xff\n",
            "1 of 2 rows have no prompt that can be asked; the first is line 2",
        ),
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n{"prompt"\n', "2 of 3 rows"),
        ("a.csv", b"text\nb\n", "line 2: the columns are not recognised"),
        ("a.pdf", b"x", "unknown kind of file"),
    ],
)
def test_a_file_with_a_bad_row_is_refused(
    name: str, content: bytes, told: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_prompts(str(file))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in ("none.txt", "none.jsonl"):
        with pytest.raises(DataError, match=r"(?i)no such file"):
            read_prompts(str(tmp_path / name))


def test_published_answers_can_be_asked_again(shared_data: Path) -> None:
    asked = read_prompts(str(shared_data / "alpacaeval_mistral_orpo_beta.json"))
    assert len(asked) == 805
    assert all(one.messages[-1]["content"] == one.row["instruction"] for one in asked)
