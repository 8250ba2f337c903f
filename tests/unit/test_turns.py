"""data.train_on=all-assistant: which turns of a conversation are trained, token by token.

The oracle is the tokenizer's own `apply_chat_template`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from text_pairs import assistant, tokenizer_of
from tokenizers import processors

from orpo_ray.data.checks import check_pair, explain
from orpo_ray.data.formats import Reading, read_pairs
from orpo_ray.data.pairs import (
    IntArray,
    Message,
    Pair,
    Ranges,
    Refusal,
    TokenPair,
    Trained,
    ranges_of,
)
from orpo_ray.data.rows import RAW, RowProcessor, facts_of
from orpo_ray.data.tokenise import Limits, PairTokeniser, fit
from orpo_ray.models.templates import TEMPLATES

Load = Callable[..., Any]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


U1, A1, U2, A2 = user("Name a colour."), assistant("Blue, sure."), user("And now?"), assistant("Re")
B1, B2, V2 = assistant("Seven"), assistant("No more."), user("What?")
SHARED = {"prompt": [U1, A1, U2], "chosen": [A2], "rejected": [B2]}
"""Both sides share the first answer."""
PARTED = {"chosen": [U1, A1, U2, A2], "rejected": [U1, B1, V2, B2]}
"""They part at the first answer; even the questions after it differ."""


def read(row: dict[str, Any]) -> Pair:
    found = read_pairs(row, Reading(all_turns=True))
    assert not isinstance(found, Refusal), found
    assert check_pair(found[0]) is None
    return found[0]


def tokenise(tokenizer: Any, row: dict[str, Any]) -> TokenPair | Refusal:
    [found] = PairTokeniser(tokenizer, all_turns=True).pairs([read(row)], ["row"])
    return found


def trained(tokenizer: Any, ids: IntArray, ranges: Ranges) -> list[str]:
    """The texts of the trained ranges."""
    return [tokenizer.decode(ids[start:stop]) for start, stop in ranges.tolist()]


# --- rows -----------------------------------------------------------------------------------------


def test_sides_that_part_early_share_what_is_before() -> None:
    pair = read(PARTED)
    assert pair.prompt == [U1]
    assert tuple(pair.answers.values()) == ([A1, U2, A2], [B1, V2, B2])
    assert pair.multi_turn


def test_without_it_such_rows_are_refused_and_told_what_reads_them() -> None:
    found = read_pairs(PARTED, Reading())
    assert isinstance(found, Refusal)
    assert explain(found) == (
        "chosen and rejected answer different prompts: the messages before the last answer differ; "
        "data.train_on=all-assistant reads them"
    )


@pytest.mark.parametrize("all_turns", [False, True])
@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([U1, A1, U2, A2], [U1, A1, V2, B2]),  # they part at a question
        ([U1, A1], [U1, A1, U2, B2]),  # one is the beginning of the other
        ([U1, A2], [V2, B2]),
    ],
)
def test_sides_that_part_at_no_answer_are_refused(
    chosen: list[Message], rejected: list[Message], all_turns: bool
) -> None:
    found = read_pairs({"chosen": chosen, "rejected": rejected}, Reading(all_turns=all_turns))
    assert isinstance(found, Refusal) and found.code == "different-prompts"
    assert "train_on" not in found.detail


def test_prompt_columns_and_dialogues_part_early_too() -> None:
    beside = {"prompt": "Name a colour.", "chosen": [A1, U2, A2], "rejected": [B1, V2, B2]}
    assert read(beside) == read(PARTED)
    sides = [
        "".join(
            f"\n\n{'Human' if turn['role'] == 'user' else 'Assistant'}: {turn['content']}"
            for turn in PARTED[side]
        )
        for side in ("chosen", "rejected")
    ]
    dialogues = {"chosen": sides[0], "rejected": sides[1]}
    assert read(dialogues) == read(PARTED)
    refused = read_pairs(dialogues, Reading())
    assert isinstance(refused, Refusal)
    told = 'the dialogues differ before their last "Assistant:"'
    assert refused.detail == f"{told}; data.train_on=all-assistant reads them"


def test_a_doubled_speaker_of_a_dialogue_is_joined_in_an_answer_too() -> None:
    """Real rows of HH have such answers; `last` cuts them at the second "Assistant:"."""
    row = {
        "chosen": "\n\nHuman: Q\n\nAssistant: one\n\nAssistant: two",
        "rejected": "\n\nHuman: Q\n\nAssistant: other",
    }
    pair = read(row)
    assert tuple(pair.answers.values()) == (
        [assistant("one\n\ntwo")],
        [assistant("other")],
    )


def test_sides_may_have_different_numbers_of_turns() -> None:
    pair = read({"chosen": [U1, A1], "rejected": [U1, B1, V2, B2]})
    assert tuple(pair.answers.values()) == ([A1], [B1, V2, B2])


def test_roles_inside_an_answer_are_checked() -> None:
    [pair] = read_pairs({"chosen": [U1, A1, A1, A2], "rejected": [U1, B1]}, Reading(all_turns=True))
    assert isinstance(pair, Pair)
    refused = check_pair(pair)
    assert refused is not None and refused.code == "wrong-roles"


# --- tokens ---------------------------------------------------------------------------------------

FAMILIES = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "mistral": "</s>",
    "plain": "</s>",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_is_trained_with_its_end_token_and_nothing_else(family: str) -> None:
    tokenizer, end = tokenizer_of(TEMPLATES[family].text), FAMILIES[family]
    found = tokenise(tokenizer, SHARED)
    assert isinstance(found, TokenPair), found
    space = " " if family in ("mistral", "plain") else ""
    assert trained(tokenizer, found.prompt, found.trained.prompt) == [f"{space}Blue, sure.{end}"]
    assert trained(tokenizer, found.chosen, found.trained.chosen) == [f"{space}Re{end}"]
    assert trained(tokenizer, found.rejected, found.trained.rejected) == [f"{space}No more.{end}"]
    parted = tokenise(tokenizer, PARTED)
    assert isinstance(parted, TokenPair), parted
    assert parted.trained.prompt.tolist() == []
    assert trained(tokenizer, parted.chosen, parted.trained.chosen) == [
        f"{space}Blue, sure.{end}",
        f"{space}Re{end}",
    ]
    assert trained(tokenizer, parted.rejected, parted.trained.rejected) == [
        f"{space}Seven{end}",
        f"{space}No more.{end}",
    ]


TOKENIZERS = {
    "minimind_chatml_6400": "chatml",
    "gpt2_50257": "plain",
    "mistral_v3_32768_spm": "mistral",
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("row", [SHARED, PARTED])
def test_the_whole_is_what_the_template_writes(
    shared_tokenizer: Load, name: str, row: dict[str, Any]
) -> None:
    """Turn by turn: it begins where generation starts, and ends with the first end token."""
    tokenizer = shared_tokenizer(name, TEMPLATES[TOKENIZERS[name]].text)
    pair, found = read(row), tokenise(tokenizer, row)
    assert isinstance(found, TokenPair), found

    def ids(messages: list[Message], generation: bool) -> list[int]:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    for side, turns in pair.answers.items():
        ours = [*found.prompt.tolist(), *getattr(found, side).tolist()]
        messages = [*pair.prompt, *turns]
        whole = ids(messages, generation=False)
        assert ours == whole[: len(ours)]
        assert not tokenizer.decode(whole[len(ours) :]).strip()
        bounds = found.trained.prompt.tolist()
        bounds += (getattr(found.trained, side) + len(found.prompt)).tolist()
        said = [place for place, turn in enumerate(messages) if turn["role"] == "assistant"]
        assert len(bounds) == len(said)
        for (start, stop), place in zip(bounds, said, strict=True):
            assert ours[:start] == ids(messages[:place], generation=True)
            turn = ours[start:stop]
            assert tokenizer.decode(turn[:-1]).strip() == messages[place]["content"]
            assert tokenizer.decode(turn[-1:]) in ("<|im_end|>", tokenizer.eos_token)


def test_the_ids_are_those_of_last() -> None:
    tokenizer = tokenizer_of(TEMPLATES["llama3"].text)
    [last] = PairTokeniser(tokenizer).pairs([read(SHARED)], ["row"])
    found = tokenise(tokenizer, SHARED)
    assert isinstance(last, TokenPair) and isinstance(found, TokenPair)
    for side in ("prompt", "chosen", "rejected"):
        assert getattr(last, side).tolist() == getattr(found, side).tolist()
    assert last.trained.counts == [0, len(last.chosen), len(last.rejected)]
    assert found.trained.counts == [len("Blue, sure.") + 1, len(last.chosen), len(last.rejected)]


def test_a_start_token_that_the_tokenizer_adds_moves_the_ranges(shared_tokenizer: Load) -> None:
    tokenizer = shared_tokenizer("mistral_v3_32768_spm", TEMPLATES["plain"].text)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token or '' }}", "")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    found = tokenise(tokenizer, SHARED)
    assert isinstance(found, TokenPair)
    assert found.prompt[0] == tokenizer.bos_token_id
    assert trained(tokenizer, found.prompt, found.trained.prompt) == [" Blue, sure.</s>"]


def test_tool_turns_and_calls_inside_an_answer() -> None:
    call: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
    }
    tool: Message = {"role": "tool", "content": "2"}
    template = TEMPLATES["chatml"].text.replace(
        "message['content'] | trim",
        "message['content'] | trim + (message['tool_calls'] | tojson if message['tool_calls'] "
        "else '')",
    )
    tokenizer = tokenizer_of(template)
    found = tokenise(tokenizer, {"prompt": [U1], "chosen": [call, tool, A2], "rejected": [B2]})
    assert isinstance(found, TokenPair), found
    first, second = trained(tokenizer, found.chosen, found.trained.chosen)
    assert first.startswith('[{"type"') and first.endswith("<|im_end|>")
    assert second == "Re<|im_end|>"


# --- what cannot be trained -----------------------------------------------------------------------

QWEN3 = TEMPLATES["qwen3"].text
STRIPS = TEMPLATES["chatml"].text.replace(
    "message['content'] | trim",
    "(message['content'] if loop.last else message['content'].split('</think>')[-1]) | trim",
)


@pytest.mark.parametrize(
    ("template", "row", "says"),
    [
        (QWEN3, SHARED, "message 2: the conversation does not go on from where generation of it"),
        (QWEN3, PARTED, "message 2: the conversation does not go on from where generation of it"),
        (
            STRIPS,
            {**SHARED, "prompt": [U1, assistant("<think>hm</think>Blue"), U2]},
            "message 2: the chat template changes it if more turns follow",
        ),
        (
            TEMPLATES["chatml"].text.replace("| trim", "| replace('Blue', 'Red')"),
            SHARED,
            "message 2: the chat template changes it",
        ),
        (TEMPLATES["chatml"].text, {**SHARED, "prompt": [U1, assistant(" "), U2]}, "it is empty"),
    ],
)
def test_a_turn_that_the_model_would_not_generate_so_is_refused(
    template: str, row: dict[str, Any], says: str
) -> None:
    tokenizer = tokenizer_of(template)
    found = tokenise(tokenizer, row)
    assert isinstance(found, Refusal)
    assert found.code == "untrainable-turn"
    assert says in found.detail
    if row is not PARTED:
        [last] = PairTokeniser(tokenizer).pairs([read(row)], ["row"])
        assert isinstance(last, TokenPair), "the last turn alone can be trained"


def test_a_first_token_that_is_joined_with_the_header_is_refused(shared_tokenizer: Load) -> None:
    """Generation starts from the header's own tokens, so it would never write that token."""
    template = (
        "{% for m in messages %}{{ m.content + ' ' if m.role == 'user' else m.content + "
        "eos_token + '\\n' }}{% endfor %}"
    )
    tokenizer = shared_tokenizer("gpt2_50257", template)
    found = tokenise(tokenizer, SHARED)
    assert isinstance(found, Refusal)
    assert found.detail == "message 2: its first token is joined with the text before it"


@pytest.mark.parametrize("all_turns", [False, True])
def test_an_end_token_inside_an_earlier_turn_is_refused(all_turns: bool) -> None:
    pair = read({**SHARED, "prompt": [U1, assistant("a</s>b"), U2]})
    tokenizer = tokenizer_of(TEMPLATES["chatml"].text)
    assert PairTokeniser(tokenizer, all_turns=all_turns).pairs([pair], ["row"]) == [
        Refusal("template-inside", "the prompt has </s>")
    ]


def test_marks_inside_an_answer_of_several_turns_are_refused() -> None:
    row = {**PARTED, "chosen": [U1, A1, user("x<|im_start|>"), A2]}
    assert tokenise(tokenizer_of(TEMPLATES["chatml"].text), row) == Refusal(
        "template-inside", "chosen has <|im_start|>"
    )


# --- from rows to facts ---------------------------------------------------------------------------


def block(*rows: dict[str, Any]) -> pa.Table:
    import json

    return pa.Table.from_pylist(
        [
            {"source": 0, "line": line, "text": json.dumps(row).encode(), "problem": ""}
            for line, row in enumerate(rows, 1)
        ],
        schema=RAW,
    )


def test_rows_are_processed_and_their_trained_tokens_counted() -> None:
    tokenizer = tokenizer_of(TEMPLATES["chatml"].text)
    limits = Limits(1000, 2000, "drop")
    processor = RowProcessor(tokenizer, ["a"], limits, Reading(all_turns=True))
    bad = {"prompt": "Q", "chosen": "a", "rejected": None}
    facts = facts_of(processor(block(SHARED, bad, PARTED)))
    assert facts["code"].to_pylist() == ["", "missing-rejected", ""]
    counts = [facts[f"{side}_trained"].to_pylist() for side in ("prompt", "chosen", "rejected")]
    assert counts == [[12, 0, 0], [3, 0, 12 + 3], [9, 0, 6 + 9]]
    assert facts["multi_turn"].to_pylist() == [True, None, True]
    assert len(set(facts["pair_key"].to_pylist())) == 3
    last = facts_of(RowProcessor(tokenizer, ["a"], limits, Reading())(block(SHARED, PARTED)))
    assert last["code"].to_pylist() == ["", "different-prompts"]
    assert last["prompt_trained"].to_pylist() == [0, 0]


def test_a_cut_prompt_keeps_the_ranges_of_what_is_left() -> None:
    ids = [np.arange(size, dtype=np.int32) for size in (20, 2, 2)]
    ranges = Trained(ranges_of((2, 5), (8, 12), (15, 18)), ranges_of((0, 2)), ranges_of((1, 2)))
    pair = TokenPair(pair_id="p", prompt=ids[0], chosen=ids[1], rejected=ids[2], trained=ranges)
    limits = Limits(10, 100, "truncate-prompt-left")
    cut = fit(pair, limits, None)
    assert isinstance(cut, TokenPair)
    assert cut.prompt.tolist() == list(range(10, 20))
    assert cut.trained.prompt.tolist() == [[5, 8]], "a turn that is cut is not trained"
    with_start = fit(pair, limits, 0)
    assert isinstance(with_start, TokenPair)
    assert with_start.prompt.tolist() == [0, *range(11, 20)]
    assert with_start.trained.prompt.tolist() == [[5, 8]]
    kept = [with_start.prompt[start:stop].tolist() for start, stop in with_start.trained.prompt]
    assert kept == [[15, 16, 17]]
    assert [each.tolist() for each in cut.trained[1:]] == [[[0, 2]], [[1, 2]]]
