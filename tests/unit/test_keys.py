"""Which rows are duplicates, and which prompts are held out together: by what is trained."""

import json
from typing import Any

import pyarrow as pa
import pytest

from orpo_ray.data.formats import Reading
from orpo_ray.data.rows import RAW, RowProcessor
from orpo_ray.data.tokenise import Limits

RENDERED = "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
FIRST = {"prompt": "Q?", "chosen": "A", "rejected": "B"}
LONG = "Once there was a man. " * 20


def keys(tokenizer: Any, *rows: dict[str, Any], limit: int = 200) -> list[tuple[bytes, bytes]]:
    """`pair_key` and `prompt_key` of each row."""
    block = pa.Table.from_pylist(
        [
            {"source": 0, "line": line, "text": json.dumps(row).encode(), "problem": ""}
            for line, row in enumerate(rows, 1)
        ],
        schema=RAW,
    )
    limits = Limits(limit, 2 * limit, "truncate-prompt-left")
    made = RowProcessor(tokenizer, ["a"], limits, Reading())(block).to_pylist()
    assert [row["code"] for row in made] == [""] * len(rows)
    return [(row["pair_key"], row["prompt_key"]) for row in made]


@pytest.mark.parametrize(
    "row",
    [
        {**FIRST, "chosen": "A<|im_end|>"},
        {**FIRST, "rejected": "B<|endoftext|>\n"},
        {**FIRST, "prompt": [{"role": "user", "content": "Q?"}]},
        {**FIRST, "prompt": RENDERED},
        {**FIRST, "prompt": RENDERED, "chosen": RENDERED + "A<|im_end|>"},
        {**FIRST, "documents": [{"text": "The template writes no documents."}]},
    ],
)
def test_rows_that_are_trained_alike_are_duplicates(
    chatml_tokenizer: Any, row: dict[str, Any]
) -> None:
    first, other = keys(chatml_tokenizer, FIRST, row)
    assert first == other


@pytest.mark.parametrize(
    "row",
    [
        {**FIRST, "chosen": "B", "rejected": "A"},
        {**FIRST, "chosen": "A A"},
        {**FIRST, "prompt": "Q? "},
        {**FIRST, "prompt": "\nQ?"},
    ],
)
def test_other_pairs_of_one_prompt_stay_together(
    chatml_tokenizer: Any, row: dict[str, Any]
) -> None:
    first, other = keys(chatml_tokenizer, FIRST, row)
    assert first[0] != other[0]
    assert first[1] == other[1]


def test_other_prompts_are_other_prompts_though_they_are_cut_to_one_end(
    chatml_tokenizer: Any,
) -> None:
    rows = ({**FIRST, "prompt": start + LONG} for start in ("I ask. ", "You ask. "))
    first, other = keys(chatml_tokenizer, *rows, limit=40)
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_a_template_that_trims_makes_duplicates(chatml_tokenizer: Any) -> None:
    chatml_tokenizer.chat_template = chatml_tokenizer.chat_template.replace(
        "+ content +", "+ content.strip() +"
    )
    first, other = keys(chatml_tokenizer, FIRST, {**FIRST, "prompt": " Q?\n"})
    assert first == other
