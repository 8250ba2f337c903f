"""What makes a row unfit to train on, and one line for people for each reason."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from orpo_ray.data.marks import texts_of
from orpo_ray.data.pairs import Message, Pair, Refusal

REASONS = {
    "not-json": "the row is not valid JSON",
    "not-an-object": "the row is not a JSON object with named columns",
    "duplicate-key": "the row names a column twice",
    "ragged-row": "the row has more or fewer cells than the header",
    "invalid-utf8": "the text is not valid UTF-8",
    "unknown-shape": "the columns are not recognised; name them (data.columns, or --columns "
    "prompt=..,chosen=..,rejected=..)",
    "missing-column": "a column named in `columns` is not in the row",
    "images": "the row carries images, and this trainer reads text only",
    "unpaired": "the rows are unpaired: one answer and a label, not a chosen and a rejected "
    "answer; objective.kind=kto trains on them",
    "prompt-elsewhere": "the prompt is kept in another file (prompt_id); join the two files first",
    "prompts-only": "the file has prompts but no answers",
    "wrong-type": "a column holds neither text nor chat messages",
    "wrong-label": "the label names neither of the two answers, or each as often (expected 1 or 2, "
    "left or right, a or b, or a column's name); or it calls the only answer neither good nor bad",
    "too-few-scores": "fewer than two of the answers have a score or a rank",
    "equal-scores": "all answers have the same score, so none of them is the better one",
    "small-margin": "no two of the scored answers differ by data.min_margin",
    "wrong-roles": "the roles do not make a conversation that ends with a user turn and an "
    "assistant answer",
    "different-prompts": "chosen and rejected answer different prompts",
    "missing-prompt": "the prompt is missing or empty",
    "missing-chosen": "there is no chosen answer",
    "missing-rejected": "there is no rejected answer",
    "empty-chosen": "the chosen answer is empty",
    "empty-rejected": "the rejected answer is empty",
    "identical": "chosen and rejected are the same",
    "template-refused": "the chat template refuses the conversation",
    "template-rewrites": "the chat template changes the answer; the model would learn a text that "
    "it never generates (model.chat_template names another template)",
    "template-inside": "a text holds marks of a chat template or special tokens, and is no prompt "
    "that was rendered by this template",
    "messages-as-text": "a column holds messages as text that is no valid JSON",
    "dialogue-inside": "an answer holds a whole dialogue (Human: ... Assistant: ...)",
    "no-end-token": "the chat template writes no end token after the answer",
    "untrainable-turn": "an assistant turn cannot be trained as the model generates it "
    "(data.train_on=all-assistant; last trains the last one alone)",
    "end-token-inside": "the answer contains the end token before its end",
    "overlong": "the prompt and the longer of its two answers have more tokens than max_length",
    "overlong-prompt": "the prompt has more tokens than max_prompt_length",
    "overlong-either": "the pair has more tokens than max_length, or its prompt more than "
    "max_prompt_length",
}
"""One line for people, by reason code. A row with a code that is not in DROPPED is a bad row."""

OVERLONG_PAIR = "overlong"
OVERLONG_PROMPT = "overlong-prompt"
OVERLONG = frozenset({OVERLONG_PAIR, OVERLONG_PROMPT})
"""Reasons of rows that are dropped for their length. With a higher max_prompt_length, a row with
an overlong prompt fits.
"""
SMALL_MARGIN = "small-margin"
DROPPED = OVERLONG | {SMALL_MARGIN}
"""Reasons of rows that are dropped because a setting asks for it."""
OVERLONG_EITHER = "overlong-either"
"""The reason in data that an older version prepared: it had one count for both limits."""

WHOLE_FILE = frozenset(
    {"images", "unpaired", "prompt-elsewhere", "prompts-only", "unknown-shape", "missing-column"}
)
"""If every row at the start of a file has one of these reasons, the whole file is refused."""


def explain(refusal: Refusal) -> str:
    """One line for people: the reason, and what exactly was found."""
    return REASONS[refusal.code] + (f": {refusal.detail}" if refusal.detail else "")


def check_pair(pair: Pair) -> Refusal | None:
    """The first reason why a pair is unfit to train on, or None."""
    return (
        _check_question(pair.prompt)
        or _check_roles(pair)
        or _check_answers(pair)
        or _check_unicode([*pair.prompt, *pair.answers.values(), pair.context])
    )


def check_prompt(messages: list[Message]) -> Refusal | None:
    """The first reason why a model cannot answer a conversation, or None."""
    return (
        _check_question(messages)
        or _check_order([message["role"] for message in messages])
        or _check_unicode(messages)
    )


def _check_question(messages: list[Message]) -> Refusal | None:
    if not any(message["content"].strip() for message in messages):
        return Refusal("missing-prompt")
    last = messages[-1]
    if last["role"] not in ("user", "tool"):
        return Refusal("wrong-roles", f"the prompt ends with a turn of role {last['role']!r}")
    if last["role"] == "user" and not last["content"].strip():
        return Refusal("missing-prompt", "the last user turn is empty")
    return None


def _check_roles(pair: Pair) -> Refusal | None:
    for turns in pair.answers.values():
        refused = _check_order([message["role"] for message in (*pair.prompt, *turns)])
        if refused:
            return refused
    return None


def _check_order(roles: list[str]) -> Refusal | None:
    """A user may write two turns one after the other. The model may not, and never writes first."""
    if "system" in roles[1:]:
        return Refusal("wrong-roles", "a system turn is not the first")
    if next(role for role in roles if role != "system") == "assistant":
        return Refusal("wrong-roles", "an assistant turn comes before the first user turn")
    turns = list(pairwise(roles))
    if ("assistant", "assistant") in turns:
        return Refusal("wrong-roles", "an assistant turn directly follows another one")
    if any(second == "tool" and first not in ("assistant", "tool") for first, second in turns):
        return Refusal("wrong-roles", "a tool turn follows no assistant turn")
    return None


def _check_answers(pair: Pair) -> Refusal | None:
    for side, turns in pair.answers.items():
        if _is_empty(turns[-1]):
            return Refusal(f"empty-{side}")
    said = [
        [{**turn, "content": turn["content"].strip()} for turn in turns]
        for turns in pair.answers.values()
    ]
    return Refusal("identical") if said[0] in said[1:] else None


def _is_empty(answer: Message) -> bool:
    return not answer["content"].strip() and not answer.get("tool_calls")


def _check_unicode(values: Sequence[Any]) -> Refusal | None:
    """Refuse half surrogate pairs, which no tokenizer takes.

    They come from broken JSON escapes and from CSV bytes that are not UTF-8.
    """
    for text in texts_of(values):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return Refusal(
                "invalid-utf8", f"character {error.start + 1} is half of a surrogate pair"
            )
    return None
