"""Prompt and answer together are what the template writes for the whole row, whatever is in it.

The oracle is the tokenizer's own `apply_chat_template`. A row that cannot be so is refused.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_pairs import read_pair, tokenizer_of

from orpo_ray.data.checks import check_pair
from orpo_ray.data.pairs import Pair, Refusal, TokenPair
from orpo_ray.data.tokenise import PairTokeniser
from orpo_ray.models.templates import TEMPLATES

_CALLS = (
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>\\n' + call.function | tojson + "
    "'\\n</tool_call>' }}{% endfor %}"
)
_TOOLS = "{% if tools %}{{ 'TOOLS' + tools | tojson + '\\n' }}{% endif %}"
_DOCUMENTS = "{% for d in documents or [] %}{{ 'DOC ' + d.text + '\\n' }}{% endfor %}"

MISTRAL_TOOLS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}"
    "{% if tools and loop.last %}{{ '[AVAILABLE_TOOLS]' + tools | tojson }}{% endif %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}"
    "{% elif m.role == 'system' %}{{ raise_exception('no system turn') }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS]' + m.tool_calls | tojson + eos_token }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
QWEN3_THINKING = (
    _TOOLS + _DOCUMENTS + "{% set last = namespace(user=0) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > last.user %}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content }}" + _CALLS + "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] }}"
    + _CALLS
    + "{{ eos_token }}"
    "{% else %}{{ '<|' + m.role + '|>' + (m.name + ': ' if m.name else '') + m.content }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
FAMILIES = {
    "chatml": TEMPLATES["chatml"].text,
    "llama3": TEMPLATES["llama3"].text,
    "gemma": TEMPLATES["gemma"].text,
    "phi3": TEMPLATES["phi3"].text,
    "plain": TEMPLATES["plain"].text,
    "qwen3": TEMPLATES["qwen3"].text,
    "qwen3, thinking": QWEN3_THINKING,
    "mistral with tools": MISTRAL_TOOLS,
    "deepseek": DEEPSEEK,
}
TEXTS = st.text(st.characters(codec="ascii", exclude_characters="<[|:\x00"), min_size=1).filter(
    lambda text: bool(text.strip())
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLS = st.lists(
    st.builds(
        lambda value: {"type": "function", "function": {"name": "add", "arguments": {"a": value}}},
        st.one_of(TEXTS, st.integers()),
    ),
    max_size=2,
)
CONTENTS = st.one_of(
    TEXTS,
    st.lists(st.builds(lambda text: {"type": "text", "text": text}, TEXTS), min_size=1),
)


@st.composite
def messages(draw: st.DrawFn, role: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": role, "content": draw(CONTENTS)}
    if role == "assistant":
        if calls := draw(CALLS):
            message["tool_calls"] = calls
        if draw(st.booleans()):
            message["reasoning_content"] = draw(TEXTS)
    elif draw(st.integers(0, 3)) == 0:
        message["name"] = "add"
    return message


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    turns = [draw(messages("system"))] if draw(st.booleans()) else []
    turns.append(draw(messages("user")))
    for _ in range(draw(st.integers(0, 2))):
        turns.append(draw(messages("assistant")))
        turns.append(draw(messages(draw(st.sampled_from(["user", "tool"])))))
    row = {
        "prompt": turns,
        "chosen": [draw(messages("assistant"))],
        "rejected": [draw(messages("assistant"))],
    }
    if draw(st.booleans()):
        row["tools"] = [TOOL]
    if draw(st.booleans()):
        row["documents"] = [{"title": "t", "text": draw(TEXTS)}]
    return row


def flat(message: dict[str, Any]) -> dict[str, Any]:
    """A message as the template gets it: its parts of text joined."""
    content = message["content"]
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return {**message, "content": content}


def rendered(tokenizer: Any, row: dict[str, Any], side: str) -> str:
    context = {name: row[name] for name in ("tools", "documents") if name in row}
    whole = [flat(message) for message in (*row["prompt"], *row[side])]
    return str(tokenizer.apply_chat_template(whole, tokenize=False, **context))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(row=conversations())
def test_prompt_and_answer_are_what_the_template_writes_for_the_row(
    family: str, row: dict[str, Any]
) -> None:
    tokenizer = tokenizer_of(FAMILIES[family])
    pair = read_pair(row)
    assert isinstance(pair, Pair), pair
    if refused := check_pair(pair):
        assert refused.code == "identical", refused
        return
    [found] = PairTokeniser(tokenizer).pairs([pair], ["row"])
    if not isinstance(found, TokenPair):
        assert found.code in ("template-refused", "template-rewrites", "identical"), found
        return
    for side, answer in (("chosen", found.chosen), ("rejected", found.rejected)):
        whole = tokenizer(rendered(tokenizer, row, side), add_special_tokens=False)["input_ids"]
        ours = [*found.prompt.tolist(), *answer.tolist()]
        assert ours == whole[: len(ours)]
        assert not tokenizer.decode(whole[len(ours) :]).strip()


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(row=conversations())
def test_each_turn_that_is_trained_begins_where_its_generation_starts(
    family: str, row: dict[str, Any]
) -> None:
    tokenizer = tokenizer_of(FAMILIES[family])
    pair = read_pair(row)
    assert isinstance(pair, Pair), pair
    [last] = PairTokeniser(tokenizer).pairs([pair], ["row"])
    [found] = PairTokeniser(tokenizer, all_turns=True).pairs([pair], ["row"])
    if isinstance(last, Refusal) or isinstance(found, Refusal):
        assert found == last or (isinstance(found, Refusal) and found.code == "untrainable-turn")
        return
    assert found.prompt.tolist() == last.prompt.tolist()
    assert [each.tolist() for each in found.trained[1:]] == [
        each.tolist() for each in last.trained[1:]
    ]
    turns = [place for place, turn in enumerate(pair.prompt) if turn["role"] == "assistant"]
    assert len(found.trained.prompt) == len(turns)
    for place, (start, stop) in zip(turns, found.trained.prompt.tolist(), strict=True):
        before = tokenizer.apply_chat_template(
            pair.prompt[:place], tokenize=False, add_generation_prompt=True, **pair.context
        )
        assert tokenizer.decode(found.prompt[:start]) == before
        said = tokenizer.apply_chat_template(
            pair.prompt[: place + 1], tokenize=False, **pair.context
        )
        assert said.rstrip() == tokenizer.decode(found.prompt[:stop]).rstrip()
        assert found.prompt[stop - 1] in tokenizer.added_tokens_decoder


# --- thoughts -------------------------------------------------------------------------------------

R1 = DEEPSEEK.replace("{{ '<|Assistant|>' }}", "{{ '<|Assistant|><think>\\n' }}")
THINKS = "<think>\n"


@pytest.mark.parametrize(
    ("answer", "trained"),
    [
        # No thoughts: the block that the prompt opens is closed at once.
        ({"content": "Yes"}, "\n</think>\n\nYes</s>"),
        ({"content": "Yes", "reasoning_content": "hm"}, "hm\n</think>\n\nYes</s>"),
        # As the model wrote it, with and without the opening that was in its prompt.
        ({"content": "hm\n</think>\n\nYes"}, "hm\n</think>\n\nYes</s>"),
        ({"content": "<think>\nhm\n</think>\n\nYes"}, "hm\n</think>\n\nYes</s>"),
    ],
)
def test_a_prompt_that_opens_thoughts_is_followed_by_them(
    answer: dict[str, str], trained: str
) -> None:
    """The template writes the opening for generation only, and drops an answer's thoughts."""
    assert R1 != DEEPSEEK
    tokenizer = tokenizer_of(R1)
    row = {
        "prompt": "Q",
        "chosen": [{"role": "assistant", **answer}],
        "rejected": [{"role": "assistant", "content": "No"}],
    }
    pair = read_pair(row)
    assert isinstance(pair, Pair)
    tokeniser = PairTokeniser(tokenizer)
    [found] = tokeniser.pairs([pair], ["row"])
    assert isinstance(found, TokenPair)
    prompt, chosen, rejected = (
        tokenizer.decode(ids) for ids in (found.prompt, found.chosen, found.rejected)
    )
    assert prompt == tokenizer.decode(tokeniser.prompts([pair.prompt])[0])
    assert prompt.endswith("<|Assistant|>" + THINKS)
    assert chosen == trained
    assert rejected == "\n</think>\n\nNo</s>"
    assert tokeniser.ignored_fields(pair) == []


def test_thoughts_inside_the_content_are_trained_as_the_template_writes_them() -> None:
    """Templates such as Qwen3's read the block, and write it with lines of their own."""
    template = TEMPLATES["chatml"].text.replace(
        "message['content']",
        "(message['content'] | replace('</think>', '\\n</think>\\n\\n') | "
        "replace('<think>', '<think>\\n'))",
    )
    assert template != TEMPLATES["chatml"].text
    tokenizer = tokenizer_of(template)
    pair = read_pair({"prompt": "Q", "chosen": "<think>hm</think>Yes", "rejected": "No"})
    assert isinstance(pair, Pair)
    [found] = PairTokeniser(tokenizer).pairs([pair], ["row"])
    assert isinstance(found, TokenPair)
    assert tokenizer.decode(found.chosen) == "<think>\nhm\n</think>\n\nYes<|im_end|>"


@pytest.mark.parametrize("family", FAMILIES)
def test_each_template_takes_a_plain_conversation(family: str) -> None:
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
    pair = read_pair(row)
    assert isinstance(pair, Pair)
    [found] = PairTokeniser(tokenizer_of(FAMILIES[family])).pairs([pair], ["row"])
    assert isinstance(found, TokenPair)
