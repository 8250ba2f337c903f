"""Every shape of the table: from a row of a file to the pair that is trained."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from text_pairs import assistant, read_pair, text_pair

from orpo_ray.config.data import Columns, Source
from orpo_ray.data import formats
from orpo_ray.data.checks import check_pair
from orpo_ray.data.formats import SHAPES, Shape
from orpo_ray.data.json_text import unpacked
from orpo_ray.data.pairs import Message, Pair, Refusal
from orpo_ray.data.rows import parse_row
from orpo_ray.data.sources import read_rows


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


PLAIN = text_pair([user("Q")], "good", "bad")

ROWS_OF_ONE_PAIR: dict[str, dict[str, Any]] = {
    "strings": {"prompt": "Q", "chosen": "good", "rejected": "bad"},
    "chat with prompt": {
        "prompt": [user("Q")],
        "chosen": [assistant("good")],
        "rejected": [assistant("bad")],
    },
    "chat, implicit prompt": {
        "chosen": [user("Q"), assistant("good")],
        "rejected": [user("Q"), assistant("bad")],
    },
    "UltraFeedback": {
        "prompt": "Q",
        "prompt_id": "7f",
        "chosen": [user("Q"), assistant("good")],
        "rejected": [user("Q"), assistant("bad")],
        "messages": [user("Q"), assistant("good")],
        "score_chosen": 8.5,
    },
    "one message": {"prompt": "Q", "chosen": assistant("good"), "rejected": assistant("bad")},
    "HH": {
        "chosen": "\n\nHuman: Q\n\nAssistant: good",
        "rejected": "\n\nHuman: Q\n\nAssistant: bad",
    },
    "HH with prompt": {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": "good", "rejected": "bad"},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "from and content": {
        "context": [{"from": "user", "content": "Q"}],
        "chosen": [{"from": "assistant", "content": "good"}],
        "rejected": [{"from": "assistant", "content": "bad"}],
    },
    "Alpaca": {"instruction": "Q", "input": "", "output": "x", "rejected": "bad", "chosen": "good"},
    "OpenAI": {
        "input": {"messages": [user("Q")], "tools": []},
        "preferred_output": [assistant("good")],
        "non_preferred_output": [assistant("bad")],
    },
    "label 1": {"input": "Q", "output_1": "good", "output_2": "bad", "label": 1},
    "label 2": {"input": "Q", "output_1": "bad", "output_2": "good", "label": "2"},
    "arena": {"prompt": "Q", "response_a": "bad", "response_b": "good", "winner": "model_b"},
    "Argilla, votes": {
        "prompt": "Q",
        "response-1": "bad",
        "response-2": "good",
        "preference": [{"value": name, "user_id": "u"} for name in ("response-2", "2", "1")],
    },
    "Label Studio": {
        "id": 1,
        "data": {"prompt": "Q", "answer1": "bad", "answer2": "good"},
        "annotations": [
            {"was_cancelled": True, "result": []},
            {"result": [{"type": "pairwise", "value": {"selected": "right"}}]},
        ],
    },
    "Label Studio, small": {"prompt": "Q", "answer1": "good", "answer2": "bad", "choice": "left"},
    "reject": {"prompt": "Q", "chosen": "good", "reject": "bad"},
    "UltraFeedback, raw": {
        "source": "s",
        "instruction": "Q",
        "completions": [
            {"model": "m", "response": "so-so", "overall_score": 5.0},
            {"model": "n", "response": "bad", "overall_score": 2},
            {"model": "o", "response": "good", "overall_score": "7.5"},
            {"model": "p", "response": "not judged", "overall_score": None},
        ],
    },
    "Nectar": {
        "prompt": "\n\nHuman: Q\n\nAssistant: ",
        "answers": [{"answer": "bad", "rank": 7}, {"answer": "good", "rank": 1}],
        "num_responses": 2,
    },
    "distilabel": {"instruction": "Q", "generations": ["bad", "good"], "ratings": [1, 4]},
    "ranks beside": {"prompt": "Q", "responses": ["good", "x", "bad"], "ranks": [1, 2, 3]},
    "ms-swift": {"messages": [user("Q"), assistant("good")], "rejected_response": "bad"},
    "ms-swift, two conversations": {
        "messages": [user("Q"), assistant("good")],
        "rejected_messages": [user("Q"), assistant("bad")],
    },
    "chosen_messages": {
        "chosen_messages": [user("Q"), assistant("good")],
        "rejected_messages": [user("Q"), assistant("bad")],
    },
    "chosen_response": {"prompt": "Q", "chosen_response": "good", "rejected_response": "bad"},
    "request": {"request": "Q", "chosen": "good", "rejected": "bad"},
    "question": {"question": "Q", "chosen": "good", "rejected": "bad", "system": ""},
    "text parts": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}],
        "chosen": "good",
        "rejected": "bad",
    },
    "messages": {"messages": [user("Q")], "chosen": "good", "rejected": "bad"},
    "messages and one message": {
        "messages": [user("Q")],
        "chosen": [assistant("good")],
        "rejected": [assistant("bad")],
    },
    "nulls beside": {
        "prompt": "Q",
        "chosen": "good",
        "rejected": "bad",
        "images": None,
        "input": None,
    },
}


@pytest.mark.parametrize("name", ROWS_OF_ONE_PAIR)
def test_each_shape_gives_the_same_pair(name: str) -> None:
    assert read_pair(ROWS_OF_ONE_PAIR[name]) == PLAIN


SINGLE_ANSWERS: dict[str, tuple[dict[str, Any], str]] = {
    "TRL": ({"prompt": "Q", "completion": "x", "label": True}, "chosen"),
    "TRL, chat": (
        {"prompt": [user("Q")], "completion": [assistant("x")], "label": False},
        "rejected",
    ),
    "LLaMA-Factory": (
        {"instruction": "Q", "input": "", "output": "x", "kto_tag": True},
        "chosen",
    ),
    "LLaMA-Factory, ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "x"}],
            "kto_tag": False,
        },
        "rejected",
    ),
    "ms-swift": ({"messages": [user("Q"), assistant("x")], "label": 1}, "chosen"),
    "messages and a completion": (
        {"messages": [user("Q")], "completion": "x", "label": "0"},
        "rejected",
    ),
    "thumbs": ({"question": "Q", "response": "x", "thumbs_up": False}, "rejected"),
    "a word": ({"question": "Q", "answer": "x", "feedback": "Good"}, "chosen"),
    "from CSV": ({"prompt": "Q", "completion": "x", "label": "True"}, "chosen"),
    "minus one": ({"prompt": "Q", "completion": "x", "label": -1}, "rejected"),
}
"""Rows with one answer, and the side on which it stands."""


@pytest.mark.parametrize("name", SINGLE_ANSWERS)
def test_a_single_answer_is_a_pair_with_one_side(name: str) -> None:
    row, side = SINGLE_ANSWERS[name]
    sides = {"chosen": None, "rejected": None, side: assistant("x")}
    assert read_pair(row, single_answers=True) == Pair(prompt=[user("Q")], **sides)
    refused = read_pair(row)
    assert isinstance(refused, Refusal) and refused.code == "unpaired"


def test_two_answers_are_a_pair_whatever_label_is_beside_them() -> None:
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad", "completion": "x", "label": True}
    assert read_pair(row, single_answers=True) == PLAIN


def test_a_label_that_is_neither_good_nor_bad_is_refused() -> None:
    refused = read_pair({"prompt": "Q", "completion": "x", "label": "B"}, single_answers=True)
    assert refused == Refusal("wrong-label", "label 'B'")


def test_a_text_about_an_answer_is_no_label() -> None:
    for about in ("It could be shorter.", 1, 5):
        row = {"prompt": "Q", "completion": "x", "feedback": about}
        refused = read_pair(row, single_answers=True)
        assert isinstance(refused, Refusal) and refused.code == "unknown-shape"


def test_a_column_that_no_pair_is_read_from_may_hold_anything() -> None:
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
    left_over = "array([{'content': 'Q', 'role': 'user'}], dtype=object)"
    assert read_pair({**row, "raw": left_over}) == PLAIN
    assert read_pair({**row, "system": left_over}).code == "messages-as-text"


def test_white_space_in_a_turn_before_makes_no_other_prompt() -> None:
    row = {
        side: [user("Q"), assistant("a"), user(f"R{space}"), assistant(text)]
        for side, space, text in (("chosen", "", "good"), ("rejected", " ", "bad"))
    }
    pair = read_pair(row)
    assert isinstance(pair, Pair) and pair.prompt[-1] == user("R")


def test_an_instruction_of_a_single_answer_has_its_input_and_history() -> None:
    row = {
        "instruction": "Q",
        "input": "in",
        "history": [["a", "b"]],
        "output": "x",
        "label": True,
    }
    pair = read_pair(row, single_answers=True)
    assert isinstance(pair, Pair)
    assert pair.prompt == [user("a"), assistant("b"), user("Q\n\nin")]


def test_named_columns_of_a_single_answer() -> None:
    columns = Columns(prompt="q", completion="a", label="ok")
    row = {"q": "Q", "a": "x", "ok": "yes", "system": "S"}
    assert read_pair(row, columns, single_answers=True) == Pair(
        prompt=[system("S"), user("Q")], chosen=assistant("x"), rejected=None
    )
    refused = read_pair({**row, "ok": "perhaps"}, columns, single_answers=True)
    assert refused == Refusal("wrong-label", "ok 'perhaps'")


def test_every_shape_of_the_table_is_tried_above() -> None:
    assert {shape.name for shape in SHAPES} == {
        "two outputs and a label",
        "Label Studio's pairwise export",
        "OpenAI preference",
        "ShareGPT conversations",
        "Alpaca instruction",
        "prompt and two answers",
        "prompt inside the answers",
        "messages and two answers",
        "messages and a rejected answer",
        "answers with scores",
        "one answer and a label",
        "a conversation and a label",
    }


def test_every_shape_of_the_table_is_reached_by_some_row(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: set[str] = set()

    def recording(shape: Shape) -> Shape:
        def read(*arguments: Any) -> Any:
            found = shape.read(*arguments)
            if found is not None:
                reached.add(shape.name)
            return found

        return replace(shape, read=read)

    monkeypatch.setattr(formats, "SHAPES", tuple(recording(shape) for shape in SHAPES))
    for row in (*ROWS_OF_ONE_PAIR.values(), *(row for row, _ in SINGLE_ANSWERS.values())):
        read_pair(row)
    assert reached == {shape.name for shape in SHAPES}


def test_messages_do_not_win_over_conversations_inside_the_answers() -> None:
    row = {"chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]}
    assert read_pair({**row, "messages": row["chosen"]}) == PLAIN


U1, A1, U2, KIND = user("one"), assistant("answer"), user("two"), system("Be kind.")

JOINED: dict[str, tuple[list[Message] | str, list[Message], list[Message]]] = {
    # prompt, messages before the last answer, what is trained
    "answers repeat the last question": ([U1, A1, U2], [U2], [U1, A1, U2]),
    "answers repeat all but the system turn": ([KIND, U1], [U1], [KIND, U1]),
    "answers repeat the end and go on": ([KIND, U1], [U1, A1, U2], [KIND, U1, A1, U2]),
    "answers hold a system turn more": ("one", [KIND, U1], [KIND, U1]),
    "the prompt is the first question": ("one", [U1, A1, U2], [U1, A1, U2]),
    "the prompt is the last question": ("two", [U1, A1, U2], [U1, A1, U2]),
    "the same": ([U1, A1, U2], [user("one "), A1, U2], [user("one "), A1, U2]),
}


@pytest.mark.parametrize("name", JOINED)
def test_no_turn_is_lost_if_prompt_and_answers_overlap(name: str) -> None:
    prompt, inside, whole = JOINED[name]
    row = {
        "prompt": prompt,
        "chosen": [*inside, assistant("good")],
        "rejected": [*inside, assistant("bad")],
    }
    assert read_pair(row) == text_pair(whole, "good", "bad")


@pytest.mark.parametrize(
    ("prompt", "inside"),
    [
        ([U1, A1, U2], [U1]),
        ([KIND, U1], [system("Be rude."), U1]),
        ([user("answer")], [U1, assistant("answer"), U2]),
    ],
)
def test_a_prompt_that_is_not_the_one_inside_the_answers(
    prompt: list[Message], inside: list[Message]
) -> None:
    row = {
        "prompt": prompt,
        "chosen": [*inside, assistant("good")],
        "rejected": [*inside, assistant("bad")],
    }
    assert read_pair(row) == Refusal(
        "different-prompts", "the prompt is not the one inside the answers"
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "one", "chosen": "good", "rejected": "bad"},
        {"prompt": [U1], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"prompt": [KIND, U1], "chosen": "good", "rejected": "bad"},
        {"chosen": [U1, assistant("good")], "rejected": [U1, assistant("bad")]},
        {"conversations": [KIND, U1], "chosen": assistant("good"), "rejected": assistant("bad")},
        {"conversations": [U1], "chosen": assistant("good"), "rejected": assistant("bad")},
        {"messages": [U1], "chosen": "good", "rejected": "bad"},
        {
            "input": {"messages": [U1]},
            "preferred_output": [assistant("good")],
            "non_preferred_output": [assistant("bad")],
        },
        {
            "chosen": "\n\nHuman: one\n\nAssistant: good",
            "rejected": "\n\nHuman: one\n\nAssistant: bad",
        },
    ],
)
def test_a_system_column_is_never_dropped(row: dict[str, Any]) -> None:
    assert read_pair({"system": "Be kind.", **row}) == text_pair([KIND, U1], "good", "bad")


def test_a_system_column_that_disagrees_is_refused() -> None:
    row = {"system": "Be rude.", "prompt": [KIND, U1], "chosen": "good", "rejected": "bad"}
    wanted = Refusal(
        "different-prompts", "the system column is not the system turn of the conversation"
    )
    assert read_pair(row) == wanted


def test_a_system_column_that_is_named_is_what_it_is_named() -> None:
    row = {"system": "Q", "chosen": "good", "rejected": "bad"}
    assert read_pair(row, Columns(prompt="system", chosen="chosen", rejected="rejected")) == PLAIN


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("Human: hi\n\nAssistant:", [user("hi")]),
        ("\n\nHuman: hi\n\nAssistant: ", [user("hi")]),
        ("Human: one\n\nAssistant: answer\n\nHuman: two\n\nAssistant:", [U1, A1, U2]),
        ("Be kind.\n\nHuman: one\n\nAssistant:", [KIND, U1]),
        ("Human: what is that?", [user("Human: what is that?")]),
        ("Complete: Assistant:", [user("Complete: Assistant:")]),
    ],
)
def test_hh_prompts_with_or_without_leading_newlines(prompt: str, turns: list[Message]) -> None:
    assert read_pair({"prompt": prompt, "chosen": "good", "rejected": "bad"}) == text_pair(
        turns, "good", "bad"
    )


def test_columns_name_what_is_not_recognised() -> None:
    row = {
        "q": "Q",
        "right_answer": "good",
        "hallucinated_answer": "bad",
        "chosen": "decoy",
        "prompt": "decoy",
    }
    columns = Columns(prompt="q", chosen="right_answer", rejected="hallucinated_answer")
    assert read_pair(row, columns) == PLAIN


def test_columns_leave_a_source_of_another_shape_alone() -> None:
    columns = Columns(prompt="question", chosen="right", rejected="wrong")
    assert read_pair(ROWS_OF_ONE_PAIR["strings"], columns) == PLAIN


def test_a_misspelt_column_is_not_silently_replaced_by_recognition() -> None:
    columns = Columns(prompt="prompt", chosen="chosne", rejected="rejected")
    found = read_pair(ROWS_OF_ONE_PAIR["strings"], columns)
    assert found == Refusal(
        "missing-column", "chosne is not among columns prompt, chosen, rejected"
    )


def test_alpaca_input_and_system_and_history_are_kept() -> None:
    row = {
        "instruction": "Translate.",
        "input": "chat",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
        "chosen": "cat",
        "rejected": "dog",
    }
    prompt = [system("Be brief."), user("Hi"), assistant("Hello"), user("Translate.\n\nchat")]
    assert read_pair(row) == text_pair(prompt, "cat", "dog")


def test_two_outputs_of_an_instruction_keep_its_input() -> None:
    row = {
        "instruction": "Translate.",
        "input": "chat",
        "response_1": "dog",
        "response_2": "cat",
        "preference": 2,
    }
    assert read_pair(row) == text_pair([user("Translate.\n\nchat")], "cat", "dog")


def test_a_system_column_next_to_a_question() -> None:
    row = {"system": "Be kind.", "question": "Q", "chosen": "good", "rejected": "bad"}
    assert read_pair(row) == text_pair([system("Be kind."), user("Q")], "good", "bad")


def test_only_the_last_assistant_turn_is_the_answer() -> None:
    before = [user("a"), assistant("b"), user("Q")]
    found = read_pair(
        {"chosen": [*before, assistant("good")], "rejected": [*before, assistant("bad")]}
    )
    assert found == text_pair(before, "good", "bad")
    assert isinstance(found, Pair) and found.multi_turn


def test_answers_with_more_turns_extend_the_prompt() -> None:
    more = [assistant("b"), user("Q")]
    row = {
        "prompt": "a",
        "chosen": [*more, assistant("good")],
        "rejected": [*more, assistant("bad")],
    }
    assert read_pair(row) == text_pair([user("a"), *more], "good", "bad")


def test_hh_keeps_role_words_inside_a_turn_and_joins_doubled_speakers() -> None:
    start = (
        "\n\nHuman: He said Human: hi\n\nAssistant: one\n\nAssistant: two\n\nHuman: Q\n\nAssistant:"
    )
    prompt = [user("He said Human: hi"), assistant("one\n\ntwo"), user("Q")]
    assert read_pair({"chosen": start + " good", "rejected": start + " bad "}) == text_pair(
        prompt, "good", "bad"
    )


# --- structure inside text ------------------------------------------------------------------------


@pytest.mark.parametrize("notation", [json.dumps, repr])
def test_messages_kept_as_text_are_read(notation: Any) -> None:
    whole = {
        side: notation([user("Q"), assistant(text)])
        for side, text in (("chosen", "good"), ("rejected", "bad"))
    }
    assert read_pair(whole) == read_pair({"prompt": "Q", **whole}) == PLAIN
    answers = {"chosen": notation([assistant("good")]), "rejected": notation(assistant("bad"))}
    assert read_pair({"prompt": notation([user("Q")]), **answers}) == PLAIN
    shared = notation([{"from": "human", "value": "Q"}])
    assert read_pair({"conversations": shared, "chosen": "good", "rejected": "bad"}) == PLAIN
    openai = {"preferred_output": answers["chosen"], "non_preferred_output": answers["rejected"]}
    assert read_pair({"input": notation({"messages": [user("Q")]}), **openai}) == PLAIN


@pytest.mark.parametrize(
    "text",
    ['{"role": "admin", "content": "x"}', '[{"role": 1}]', '{"content": "x"}', '{"role": broken'],
)
def test_an_answer_that_is_other_json_stays_a_text(text: str) -> None:
    assert read_pair({"prompt": "Q", "chosen": text, "rejected": "bad"}) == text_pair(
        [user("Q")], text, "bad"
    )


def test_dialogues_in_the_answers_are_read_beside_a_prompt() -> None:
    start = "\n\nHuman: Q\n\nAssistant:"
    sides = {"chosen": start + " good", "rejected": start + " bad"}
    for prompt in (start, "Q", [user("Q")]):
        assert read_pair({"prompt": prompt, **sides}) == PLAIN
    named = Columns(prompt="p", chosen="c", rejected="r")
    row = {"p": start, "c": sides["chosen"], "r": sides["rejected"]}
    assert read_pair(row, named) == PLAIN
    found = read_pair({"prompt": "Another", **sides})
    assert isinstance(found, Refusal) and found.code == "different-prompts"


# --- what messages have besides texts -------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_fields_of_messages_and_tools_are_kept() -> None:
    asked = [
        user("Q"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "7", "name": "add"},
    ]
    good = {"role": "assistant", "content": "good", "reasoning_content": "hm", "id": 5}
    row = {"prompt": asked, "chosen": [good], "rejected": "bad", "tools": [CALL]}
    found = read_pair(row)
    assert isinstance(found, Pair) and check_pair(found) is None
    assert found.prompt[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found.prompt[2] == asked[2]
    assert found.chosen == good
    assert found.context == {"tools": [CALL]}
    assert read_pair({**row, "tools": json.dumps([CALL])}) == found
    assert read_pair({**row, "tools": None}) == replace(found, context={})


def test_older_function_calls_are_tool_calls() -> None:
    called = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    [call] = read_pair({"prompt": "Q", "chosen": called, "rejected": "bad"}).chosen["tool_calls"]
    assert call == {"type": "function", "function": CALL["function"]}


def test_an_image_beside_the_text_of_a_message_is_refused() -> None:
    asked = [{**user("Q"), "images": ["cat.png"]}]
    refused = read_pair({"prompt": asked, "chosen": "good", "rejected": "bad"})
    assert refused == Refusal("images", "column images")


def test_scored_answers_keep_their_calls_and_thoughts() -> None:
    row = {
        "prompt": "Q",
        "completions": [
            {"content": "good", "reasoning_content": "hm", "tool_calls": [CALL], "score": 3},
            {"content": "bad", "score": 1},
        ],
    }
    pair = read_pair(row)
    assert pair.chosen == {**assistant("good"), "reasoning_content": "hm", "tool_calls": [CALL]}
    assert pair.rejected == assistant("bad")


def test_what_belongs_to_one_message_alone_does_not_make_prompts_different() -> None:
    row = {
        side: [{**user("Q"), "id": f"{side} 1"}, {**assistant(text), "id": f"{side} 2"}]
        for side, text in (("chosen", "good"), ("rejected", "bad"))
    }
    assert isinstance(read_pair(row), Pair)


@pytest.mark.parametrize(
    "system_column",
    [
        "S",
        [system("S")],
        json.dumps([system("S")]),
        system("S"),
    ],
)
def test_a_system_column_may_hold_a_message(system_column: Any) -> None:
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad", "system": system_column}
    assert read_pair(row) == replace(PLAIN, prompt=[system("S"), user("Q")])


def test_system_columns_that_hold_something_else_are_refused() -> None:
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
    other = read_pair({**row, "system": [user("S")]})
    assert other == Refusal("wrong-type", "system holds no text")
    assert read_pair({**row, "system_prompt": ["S"]}).code == "wrong-type"
    both = read_pair({**row, "system": "S", "system_prompt": "T"})
    assert both == Refusal("different-prompts", "system and system_prompt are not the same")


def test_votes_that_were_taken_back_do_not_count() -> None:
    votes = [
        {"value": "response-1", "status": "submitted"},
        {"value": "response-2", "status": "discarded"},
        {"value": "response-2", "status": "draft"},
    ]
    row = {"prompt": "Q", "response-1": "good", "response-2": "bad", "preference": votes}
    assert read_pair(row) == PLAIN
    assert read_pair({**row, "preference": votes[1:]}).code == "wrong-label"


MESSAGES_AS_TEXT = {
    "capital roles": '[{"role": "User", "content": "Q"}]',
    "a raw line break": '[{"role": "user", "content": "Q\nR"}]',
    "twice": json.dumps(json.dumps([user("Q")])),
    "parts": '[{"role": "user", "parts": [{"text": "Q"}]}]',
    "calls alone": json.dumps(
        [user("Q"), {"role": "assistant", "content": None, "function_call": CALL["function"]}]
    ),
}


@pytest.mark.parametrize("name", MESSAGES_AS_TEXT)
def test_messages_as_text_are_read_however_they_are_written(name: str) -> None:
    found = unpacked(MESSAGES_AS_TEXT[name], "prompt")
    assert isinstance(found, list) and found[0]["role"].lower() == "user"
    pair = read_pair({"prompt": found, "chosen": "good", "rejected": "bad"})
    assert pair.prompt[0]["content"] == ("Q\nR" if name == "a raw line break" else "Q")


def test_messages_as_text_inside_of_scored_answers_are_read() -> None:
    answers = [json.dumps([assistant("good")]), json.dumps([assistant("bad")])]
    assert read_pair({"prompt": "Q", "responses": answers, "scores": [2, 1]}) == PLAIN


def test_an_array_as_text_is_refused_and_an_unknown_role_is_named() -> None:
    row = {"chosen": "good", "rejected": "bad"}
    array = "array([{'content': 'Q', 'role': 'user'}], dtype=object)"
    assert read_pair({**row, "prompt": array}).code == "messages-as-text"
    refused = read_pair({**row, "prompt": json.dumps([user("Q"), {"role": "x", "content": "y"}])})
    assert refused == Refusal("wrong-roles", "role 'x' in prompt")


def test_an_answer_that_is_json_with_a_role_stays_a_text() -> None:
    answer = '{"role": ["reader"], "members": [{"role": "user", "id": 7}]}'
    pair = read_pair({"prompt": "Write JSON.", "chosen": answer, "rejected": "no"})
    assert pair.chosen == assistant(answer)


def test_what_is_nested_too_deep_is_refused() -> None:
    deep: Any = {}
    for _ in range(700):
        deep = {"a": deep}
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
    assert read_pair({**row, "tools": [deep]}).code == "wrong-type"
    called = {**assistant("good"), "tool_calls": [deep]}
    assert read_pair({**row, "chosen": called}).code == "wrong-type"


def test_marks_of_dialogues_are_read_or_refused() -> None:
    asked = "\n\nHuman: Q\n\nAssistant:"
    assert read_pair({"prompt": asked, "chosen": "\n\nAssistant: good", "rejected": "bad"}) == PLAIN
    open_end = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Q"
    pair = read_pair({"prompt": open_end, "chosen": "good", "rejected": "bad"})
    assert pair.prompt == [user("Hi"), assistant("Hello"), user("Q")]
    for answer in ("good\n\nHuman: Thanks", [assistant("\n\nHuman: T\n\nAssistant: A")]):
        refused = read_pair({"prompt": "Q", "chosen": answer, "rejected": "bad"})
        assert refused == Refusal("dialogue-inside", "chosen")


def test_openai_tools_stand_beside_the_messages() -> None:
    row = {
        "input": {"messages": [user("Q")], "tools": [CALL], "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "tool_calls": [CALL]}],
        "non_preferred_output": [assistant("bad")],
    }
    found = read_pair(row)
    assert isinstance(found, Pair) and check_pair(found) is None
    assert found.context == {"tools": [CALL]}
    assert found.chosen == {**assistant(""), "tool_calls": [CALL]}


def test_sharegpt_calls_and_observations_are_tool_turns() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
        ],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    found = read_pair(row)
    assert isinstance(found, Pair) and check_pair(found) is None
    assert found.prompt[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
    ]


def test_parts_of_thoughts_become_reasoning_and_other_texts_content() -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "output_text", "text": "good"}]
    row = {
        "prompt": [
            {"role": "developer", "content": "S"},
            {"role": "user", "content": [{"type": "input_text", "text": "Q"}]},
        ],
        "chosen": [{"role": "assistant", "content": parts}],
        "rejected": "bad",
    }
    assert read_pair(row) == Pair(
        prompt=[system("S"), user("Q")],
        chosen={**assistant("good"), "reasoning_content": "hm"},
        rejected=assistant("bad"),
    )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "images": ({"prompt": "Q", "images": ["u"], "chosen": "good", "rejected": "bad"}, "images"),
    "image part": (
        {
            "prompt": [{"role": "user", "content": [{"type": "image"}]}],
            "chosen": "a",
            "rejected": "b",
        },
        "images",
    ),
    "KTO": ({"messages": [user("Q"), assistant("x")], "label": True}, "unpaired"),
    "KTO with completion": ({"prompt": "Q", "completion": "x", "label": 1}, "unpaired"),
    "prompt elsewhere": (
        {"id": 1, "prompt_id": "p0", "chosen": "a", "rejected": "b"},
        "prompt-elsewhere",
    ),
    "side table": ({"id": "p0", "prompt": "Q"}, "prompts-only"),
    "nothing known": (
        {"knowledge": "k", "question": "q", "right": "a", "wrong": "b"},
        "unknown-shape",
    ),
    "two prompts": (
        {"question": "q", "context": "c", "chosen": "a", "rejected": "b"},
        "unknown-shape",
    ),
    "no prompt at all": ({"q": "Q", "chosen": "a", "rejected": "b"}, "unknown-shape"),
    "null prompt": ({"prompt": None, "chosen": "a", "rejected": "b"}, "missing-prompt"),
    "no rejected": ({"prompt": "Q", "chosen": "a"}, "missing-rejected"),
    "null chosen": ({"prompt": "Q", "chosen": None, "rejected": "b"}, "missing-chosen"),
    "empty list": ({"prompt": "Q", "chosen": [], "rejected": "b"}, "missing-chosen"),
    "number": ({"prompt": "Q", "chosen": 5, "rejected": "b"}, "wrong-type"),
    "nested nulls": ({"prompt": "Q", "chosen": [None], "rejected": [{"role": None}]}, "wrong-type"),
    "null content": (
        {"prompt": "Q", "chosen": [{"role": "assistant", "content": None}], "rejected": "b"},
        "wrong-type",
    ),
    "ends with user": (
        {"chosen": [user("Q")], "rejected": [user("Q"), assistant("b")]},
        "wrong-roles",
    ),
    "unknown role": (
        {"prompt": [{"role": "critic", "content": "x"}], "chosen": "a", "rejected": "b"},
        "wrong-roles",
    ),
    "tools that are no list": (
        {"prompt": "Q", "tools": "a hammer", "chosen": "a", "rejected": "b"},
        "wrong-type",
    ),
    "a call without a name": (
        {
            "conversations": [user("Q"), {"from": "function_call", "value": "add it"}],
            "chosen": "a",
            "rejected": "b",
        },
        "wrong-type",
    ),
    "messages in no notation": (
        {"prompt": "Q", "chosen": "[{'role': 'assistant' 'content': 'a'}]", "rejected": "b"},
        "messages-as-text",
    ),
    "a dialogue in one answer": (
        {"prompt": "Q", "chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "b"},
        "dialogue-inside",
    ),
    "HH ends with Human": (
        {
            "chosen": "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R",
            "rejected": "\n\nHuman: Q\n\nAssistant: b",
        },
        "wrong-roles",
    ),
    "HH differs": (
        {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: R\n\nAssistant: a"},
        "different-prompts",
    ),
    "chat differs": (
        {"chosen": [user("Q"), assistant("a")], "rejected": [user("R"), assistant("b")]},
        "different-prompts",
    ),
    "prompt is another": (
        {
            "prompt": "Z",
            "chosen": [user("Q"), assistant("a")],
            "rejected": [user("Q"), assistant("b")],
        },
        "different-prompts",
    ),
    "label 0": ({"input": "Q", "output_1": "a", "output_2": "b", "label": 0}, "wrong-label"),
    "no annotation": (
        {
            "data": {"prompt": "Q", "answer1": "a", "answer2": "b"},
            "annotations": [3, {"result": 4}],
        },
        "wrong-label",
    ),
    "as many votes": (
        {"prompt": "Q", "response_a": "a", "response_b": "b", "choice": ["a", "b"]},
        "wrong-label",
    ),
    "label true": ({"input": "Q", "output_1": "a", "output_2": "b", "label": True}, "wrong-label"),
    "history": ({"instruction": "Q", "chosen": "a", "rejected": "b", "history": [1]}, "wrong-type"),
    "nothing": ({}, "unknown-shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_for_its_true_reason(name: str) -> None:
    row, code = REFUSED[name]
    found = read_pair(row)
    assert isinstance(found, Refusal)
    assert found.code == code


def test_unknown_columns_are_named() -> None:
    assert read_pair({"a": 1, "b": 2}) == Refusal("unknown-shape", "found columns a, b")


def outcomes(path: Path) -> Iterator[Pair | Refusal]:
    for raw in read_rows(Source(source=str(path))):
        row = parse_row(raw.text, raw.problem)
        assert isinstance(row, dict)
        pair = read_pair(row)
        yield pair if isinstance(pair, Refusal) else check_pair(pair) or pair


def test_real_hh_quirks_are_found_on_their_rows(shared_data: Path) -> None:
    """The manifest counts rows from 0.

    Rows 871, 1007 and 1051 differ before the last answer. Rows 44 and 257 have an empty answer.
    """
    found = list(outcomes(shared_data / "hh_harmless_train.jsonl.gz"))
    codes = {index: item.code for index, item in enumerate(found) if isinstance(item, Refusal)}
    assert codes == {
        44: "empty-chosen",
        257: "empty-chosen",
        871: "different-prompts",
        1007: "different-prompts",
        1051: "different-prompts",
    }
    pairs = [item for item in found if isinstance(item, Pair)]
    assert all(pair.prompt[-1]["role"] == "user" for pair in pairs)
    alternating = [
        [m["role"] for m in pair.prompt]
        == ["user", "assistant"] * (len(pair.prompt) // 2) + ["user"]
        for pair in pairs
    ]
    assert all(alternating)
    # taken together, prompt and answer are the file's own words
    raw = json.loads(
        next(read_rows(Source(source=str(shared_data / "hh_harmless_train.jsonl.gz")))).text
    )
    words = " ".join([m["content"] for m in pairs[0].prompt] + [pairs[0].chosen["content"]]).split()
    same = words == raw["chosen"].replace("\n\nHuman:", " ").replace("\n\nAssistant:", " ").split()
    assert same  # a comparison in the assert would print the texts


def test_real_sharegpt_turns(shared_data: Path) -> None:
    pairs = [
        item
        for item in outcomes(shared_data / "llamafactory_dpo_en_demo.json")
        if isinstance(item, Pair)
    ]
    shapes = Counter(
        "multi" if p.multi_turn else "+".join(m["role"] for m in p.prompt) for p in pairs
    )
    assert shapes == {"user": 114, "system+user": 80, "multi": 106}


def test_real_labels_pick_the_right_output(shared_data: Path) -> None:
    path = shared_data / "llmbar_natural.json"
    rows = json.loads(path.read_text())
    for row, pair in zip(rows, outcomes(path), strict=True):
        assert isinstance(pair, Pair)
        assert pair.chosen["content"] == row[f"output_{row['label']}"]
        assert pair.rejected["content"] == row[f"output_{3 - row['label']}"]
