"""Prompts of a file, to which a model shall answer: any row with a prompt, with answers or without.

A row may have several questions, as those of MT-Bench. Each is asked after the answer to the one
before.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from orpo_ray.config.data import Source
from orpo_ray.config.storage import expanded
from orpo_ray.data.checks import check_prompt, explain
from orpo_ray.data.formats import (
    CONVERSATIONS,
    PROMPTS,
    Reading,
    alpaca_prompt,
    read_pairs,
    unpacked_row,
)
from orpo_ray.data.joining import context_of, system_of, with_system
from orpo_ray.data.messages import RowRefused, prompt_messages, refuse_images
from orpo_ray.data.pairs import Context, Message, Refusal, Row
from orpo_ray.data.readers import RawRow, dump_row, numbered_lines
from orpo_ray.data.rows import parse_row
from orpo_ray.data.sources import read_rows, refuse_missing
from orpo_ray.errors import DataError

_TURNS = "turns"
_INSTRUCTION = "instruction"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked: a conversation that ends with a question, and the questions after it."""

    messages: list[Message]
    context: Context = field(default_factory=Context)
    later: list[str] = field(default_factory=list)
    row: Row = field(default_factory=dict)
    """The row as it was read: other tools' formats repeat some of its columns."""


def read_prompts(file: str) -> list[Asked]:
    """The prompts of a file, in order. A text file has one on each line.

    Raises DataError for a file without prompts, and for one with a row that has none.
    """
    found: list[Asked] = []
    bad: list[tuple[int, Refusal]] = []
    rows = 0
    for raw in _rows(file):
        rows += 1
        row = parse_row(raw.text, raw.problem)
        asked = row if isinstance(row, Refusal) else prompt_of(row)
        if isinstance(asked, Refusal):
            bad.append((raw.line, asked))
        else:
            found.append(asked)
    if not rows:
        raise DataError(f"{file}: no prompts in it")
    if bad:
        line, refusal = bad[0]
        raise DataError(
            f"{file}: {len(bad)} of {rows} rows have no prompt that can be asked; the first is "
            f"line {line}: {explain(refusal)}"
        )
    return found


def _rows(file: str) -> Iterator[RawRow]:
    if PurePath(file).suffix.lower() != ".txt":
        source = Source(source=file)
        refuse_missing(source)
        yield from read_rows(source)
        return
    try:
        with expanded(file).open("rb") as stream:
            for raw in numbered_lines(stream, 1):
                try:
                    yield RawRow(raw.line, dump_row({"prompt": raw.text.decode("utf-8")}))
                except UnicodeDecodeError:
                    yield RawRow(raw.line, b"", "invalid-utf8")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error


def prompt_of(row: Row) -> Asked | Refusal:
    """What a row asks, or why it asks nothing. Answers in the row are left out."""
    turns = row.get(_TURNS)
    if isinstance(turns, list) and turns and not row.keys() & {*PROMPTS, *CONVERSATIONS}:
        return _of_turns(row, turns)
    pairs = read_pairs(row, Reading(single_answers=True))
    if not isinstance(pairs, Refusal):
        return Asked(messages=pairs[0].prompt, context=pairs[0].context, row=row)
    try:
        whole, _ = unpacked_row(row)
        refuse_images(whole)
        messages = prompt_messages(_question(whole))
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            return Refusal("missing-prompt")
        asked = Asked(
            messages=with_system(messages, system_of(whole, None)),
            context=context_of(whole),
            row=row,
        )
    except RowRefused as refused:
        return refused.refusal
    return check_prompt(asked.messages) or asked


def _of_turns(row: Row, turns: list[Any]) -> Asked | Refusal:
    if not all(isinstance(turn, str) and turn.strip() for turn in turns):
        return Refusal("wrong-type", f"{_TURNS} holds no list of questions")
    try:
        system, context = system_of(row, None), context_of(row)
    except RowRefused as refused:
        return refused.refusal
    questions: list[list[Message]] = [[{"role": "user", "content": turn}] for turn in turns]
    refusals = filter(None, map(check_prompt, questions))
    if refusal := next(refusals, None):
        return refusal
    return Asked(
        messages=with_system(questions[0], system), context=context, later=turns[1:], row=row
    )


def _question(row: Row) -> Any:
    """The value of the column that holds the prompt."""
    present = [name for name in (*PROMPTS, *CONVERSATIONS) if row.get(name) not in (None, "", [])]
    if _INSTRUCTION in present and "prompt" not in present:
        return alpaca_prompt(row, _INSTRUCTION)
    if not present and row.keys() & {*PROMPTS, *CONVERSATIONS}:
        raise RowRefused("missing-prompt")
    if not present:
        raise RowRefused("unknown-shape", f"found columns {', '.join(list(row)[:12])}")
    if len(present) > 1 and present[0] != "prompt":
        raise RowRefused("unknown-shape", f"{' and '.join(present)} could each be the prompt")
    return row[present[0]]
