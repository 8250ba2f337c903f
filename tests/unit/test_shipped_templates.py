"""Rows under the chat templates that TRL ships, which are those of real models.

The oracle is `apply_chat_template` of the whole row, as far as generation would go.
"""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from text_pairs import read_pair, tokenizer_of

from orpo_ray.data.checks import explain
from orpo_ray.data.pairs import Pair, Refusal, TokenPair
from orpo_ray.data.rendering import fixed_date
from orpo_ray.data.tokenise import PairTokeniser
from orpo_ray.errors import DataError

FOLDER = Path(str(files("trl"))) / "chat_templates"
TEMPLATES = sorted(
    path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training")
)
MARK = re.compile(r"<[|\uff5c][^<>\s'\"{}]+>|<[^<>\s'\"{}]+[|\uff5c]>|<\w+_of_\w+>|</s>")
WITHOUT_END = "glm4moe"
"""The next turn's mark ends an answer."""
OF_PARTS = "llava_next"
"""It reads contents that are lists of parts only."""
_REFUSED = ("template-rewrites", "template-refused")
HI = {"role": "user", "content": "What is 2 + 2?"}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def load(name: str) -> Any:
    """A tokenizer with a shipped template, whose marks are special tokens."""
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    found = tokenizer_of(template)
    marks = sorted({mark for mark in MARK.findall(template) if "think" not in mark})
    found.add_special_tokens({"additional_special_tokens": marks})
    return found


@pytest.fixture(params=[name for name in TEMPLATES if name not in (WITHOUT_END, OF_PARTS)])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """The tokenizer of each template, which ends answers with its own end token."""
    found = load(request.param)
    text = found.apply_chat_template([HI, assistant("4")], tokenize=False)
    if ends := MARK.findall(str(text).rpartition("4")[2]):
        found.eos_token = ends[-1]
    return found


def test_a_template_without_an_end_token_is_refused() -> None:
    with pytest.raises(DataError, match="ends an answer with no end token"):
        PairTokeniser(load(WITHOUT_END))


def test_a_template_that_reads_no_texts_refuses_every_row() -> None:
    found = tokens_of(load(OF_PARTS), assistant("It is 4."))
    assert isinstance(found, Refusal) and found.code == "template-refused"


def tokens_of(tokenizer: Any, chosen: dict[str, Any], **more: Any) -> TokenPair | Refusal:
    row = {"prompt": [HI], "chosen": [chosen], "rejected": [assistant("It is 5.")], **more}
    pair = read_pair(row)
    assert isinstance(pair, Pair), pair
    [found] = PairTokeniser(tokenizer).pairs([pair], ["row"])
    return found


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def test_an_answer_is_what_follows_the_prompt_in_the_whole(tokenizer: Any) -> None:
    found = tokens_of(tokenizer, assistant("It is 4."))
    if isinstance(found, Refusal):
        assert found.code in _REFUSED, explain(found)
        return
    prompt, answer = tokenizer.decode(found.prompt), tokenizer.decode(found.chosen)
    assert answer.count("It is 4.") == 1 and answer.count("</think>") <= 1
    if fixed_date(tokenizer):
        return  # the oracle writes today's
    assert prompt == tokenizer.apply_chat_template([HI], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([HI, assistant("It is 4.")], tokenize=False)
    assert whole.startswith(prompt + answer) or "</think>" in answer


def test_an_answer_ends_with_the_first_token_that_ends_a_turn(tokenizer: Any) -> None:
    found = tokens_of(tokenizer, assistant("It is 4."))
    if isinstance(found, Refusal):
        assert found.code in _REFUSED, explain(found)
        return
    asked = tokenizer.apply_chat_template(
        [HI, assistant("Yes."), {"role": "user", "content": "Why?"}], tokenize=False
    )
    after = re.match(rf"\s*({MARK.pattern})", asked.partition(HI["content"])[2])
    ends = MARK.findall(tokenizer.decode(found.chosen))
    if after and after[1] in ends:
        assert ends.index(after[1]) == len(ends) - 1


@pytest.mark.parametrize(
    "thoughts", ["<think>\nTwo and two.\n</think>\n\n", "Two and two.\n</think>\n\n"]
)
def test_thoughts_are_closed_once(tokenizer: Any, thoughts: str) -> None:
    found = tokens_of(tokenizer, assistant(f"{thoughts}It is 4."))
    if isinstance(found, Refusal):
        assert found.code in _REFUSED, explain(found)
        return
    answer = tokenizer.decode(found.chosen)
    assert answer.count("</think>") == 1
    assert answer.index("Two and two.") < answer.index("</think>") < answer.index("It is 4.")


def test_a_call_is_written_or_its_row_is_refused(tokenizer: Any) -> None:
    found = tokens_of(tokenizer, assistant(None, tool_calls=[CALL]), tools=[TOOL])
    if isinstance(found, Refusal):
        assert found.code in (*_REFUSED, "empty-chosen"), explain(found)
        return
    assert "add" in tokenizer.decode(found.chosen)


def test_a_rendered_prompt_is_read_as_its_messages_are(tokenizer: Any) -> None:
    asked = tokens_of(tokenizer, assistant("It is 4."))
    if isinstance(asked, Refusal):
        assert asked.code in _REFUSED, explain(asked)
        return
    text = tokenizer.decode(asked.prompt)
    pair = read_pair({"prompt": text, "chosen": "It is 4.", "rejected": "It is 5."})
    assert isinstance(pair, Pair), pair
    [found] = PairTokeniser(tokenizer).pairs([pair], ["row"])
    assert isinstance(found, TokenPair), found
    assert tokenizer.decode(found.prompt) == text
    assert found.chosen.tolist() == asked.chosen.tolist()
