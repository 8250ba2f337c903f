"""Two files of answers to the same prompts, as rows that can be compared."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from orpo_ray.config.data import Source
from orpo_ray.data.checks import explain
from orpo_ray.data.messages import RowRefused, prompt_messages
from orpo_ray.data.pairs import Message, Refusal, Row
from orpo_ray.data.rows import parse_row
from orpo_ray.data.sources import is_path, read_rows, refuse_missing
from orpo_ray.errors import DataError
from orpo_ray.evaluation.orders import BASE, TRAINED

_SHOWN = 60
_FORMS = "the files that generate writes: jsonl, alpaca-eval, openai"
_NO_QUESTIONS = (
    "MT-Bench's form has answers but no questions; write them with generate --format jsonl"
)


@dataclass(frozen=True, slots=True)
class Answered:
    """A conversation that ends with a question, the answer to it, and the model that gave it."""

    messages: list[Message]
    answer: str
    model: str = ""

    @property
    def asked(self) -> str:
        """All turns but the model's own: equal for answers to the same questions."""
        turns = [
            (turn["role"], turn["content"]) for turn in self.messages if turn["role"] != "assistant"
        ]
        return json.dumps(turns)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers to the same questions."""

    a: Answered
    b: Answered

    @property
    def same(self) -> list[Message]:
        """What both were asked after. Models that answered earlier turns part there."""
        turns = zip(self.a.messages, self.b.messages, strict=False)
        return [one for one, _ in takewhile(lambda both: both[0] == both[1], turns)]

    @property
    def is_identical(self) -> bool:
        """Whether there is nothing to judge."""
        return self.a.messages == self.b.messages and self.a.answer == self.b.answer


@dataclass(frozen=True, slots=True)
class Sides:
    """The rows of A and B, and what they are called."""

    rows: list[Comparison]
    a: str
    b: str

    @property
    def settings(self) -> dict[str, str]:
        """What tells these answers from others."""
        return {
            "answers of A": _hash([row.a for row in self.rows]),
            "answers of B": _hash([row.b for row in self.rows]),
        }


def _hash(answers: Sequence[Answered]) -> str:
    text = json.dumps([[one.messages, one.answer] for one in answers])
    return hashlib.sha256(text.encode()).hexdigest()


def read_sides(a: str, b: str | None) -> Sides:
    """The answers of two files, or of both models in one file: the trained one against the base.

    Raises DataError for files that cannot be read, or whose prompts are not the same.
    """
    found = read_answers(a)
    if b is not None:
        others = read_answers(b)
        for file, answers in ((a, found), (b, others)):
            _refuse_several(file, answers)
        return Sides(_matched(found, others, a, b), a, b)
    by_model: dict[str, list[Answered]] = defaultdict(list)
    for one in found:
        by_model[one.model].append(one)
    if set(by_model) != {BASE, TRAINED}:
        raise DataError(
            f"{a}: has no answers of both models, as generate --model both writes them; name a "
            "second file to compare with"
        )
    names = f"{a} ({TRAINED})", f"{a} ({BASE})"
    return Sides(_matched(by_model[TRAINED], by_model[BASE], *names), *names)


def _refuse_several(file: str, answers: Sequence[Answered]) -> None:
    models = {one.model for one in answers}
    if models == {BASE, TRAINED}:
        raise DataError(f"{file}: has the answers of both models; name this file alone")
    if len(models) > 1:
        raise DataError(
            f"{file}: has the answers of {len(models)} models; write each into a file of its own"
        )


def _matched(
    ours: Sequence[Answered], others: Sequence[Answered], a: str, b: str
) -> list[Comparison]:
    """Rows of A with those of B that were asked the same; equal prompts are taken in order."""
    waiting: dict[str, list[Answered]] = defaultdict(list)
    for other in reversed(others):
        waiting[other.asked].append(other)
    rows = []
    for number, one in enumerate(ours, start=1):
        if not waiting[one.asked]:
            raise DataError(f"{b}: has no answer to prompt {number} of {a}: {_shown(one)}")
        rows.append(Comparison(one, waiting[one.asked].pop()))
    if len(others) > len(ours):
        left = Counter(other.asked for other in others) - Counter(one.asked for one in ours)
        number, extra = next(each for each in enumerate(others, start=1) if left[each[1].asked])
        raise DataError(f"{a}: has no answer to prompt {number} of {b}: {_shown(extra)}")
    return rows


def _shown(answered: Answered) -> str:
    """The beginning of a prompt, for a message."""
    text = answered.messages[-1]["content"]
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def read_answers(file: str) -> list[Answered]:
    """The answers of a file, in order, in any of the forms that `generate` writes.

    Raises DataError for a file that cannot be read, or with a row that has no answer.
    """
    if not (is_path(file) or "://" in file):
        raise DataError(f"{file}: no such file")
    source = Source(source=file)
    refuse_missing(source)
    found = []
    for raw in read_rows(source):
        row = parse_row(raw.text, raw.problem)
        try:
            if isinstance(row, Refusal):
                raise RowRefused(row.code, row.detail)
            found.append(_sendable(_answered(row)))
        except RowRefused as refused:
            raise DataError(f"{file}: line {raw.line}: {explain(refused.refusal)}") from refused
    if not found:
        raise DataError(f"{file}: no answers in it")
    return found


def _sendable(answered: Answered) -> Answered:
    try:
        json.dumps([answered.messages, answered.answer], ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowRefused("invalid-utf8", "half of a surrogate pair") from error
    return answered


def _answered(row: Row) -> Answered:
    """What a row was asked and answers. Raises RowRefused if it is no answer."""
    if "choices" in row and "question_id" in row:
        raise RowRefused("unknown-shape", _NO_QUESTIONS)
    if "output" in row and "instruction" in row:
        question = _text(row, "instruction")
        messages: list[Message] = [{"role": "user", "content": question}]
        return Answered(messages, _text(row, "output"), str(row.get("generator", "")))
    if "answer" in row and ("messages" in row or "prompt" in row):
        messages = prompt_messages(row.get("messages", row.get("prompt")))
        return _checked(messages, _text(row, "answer"), str(row.get("model", "")))
    if "messages" in row:
        *messages, last = _turns(prompt_messages(row["messages"]))
        if last["role"] != "assistant":
            raise RowRefused("wrong-roles", "the last message is no answer")
        return _checked(messages, last["content"])
    raise RowRefused("unknown-shape", f"no answer in it; this command reads {_FORMS}")


def _checked(messages: list[Message], answer: str, model: str = "") -> Answered:
    if _turns(messages)[-1]["role"] == "assistant":
        raise RowRefused("wrong-roles", "the turn before the answer is an answer, too")
    return Answered(messages, answer, model)


def _turns(messages: list[Message]) -> list[Message]:
    if not messages:
        raise RowRefused("missing-prompt")
    return messages


def _text(row: Row, name: str) -> str:
    value: Any = row[name]
    if not isinstance(value, str):
        raise RowRefused("wrong-type", f"{name} is no text")
    return value
