"""Answers in the forms that other tools read."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from orpo_ray.data.prompts import Asked

Row = dict[str, Any]
Format = Callable[[Sequence[Asked], Sequence[Row], str], Iterator[str]]
"""The lines of a file, from what was asked, the answers to it, and the name of the model."""


def _jsonl(asked: Sequence[Asked], answers: Sequence[Row], name: str) -> Iterator[str]:
    return (line_of(row) for row in answers)


def _alpaca_eval(asked: Sequence[Asked], answers: Sequence[Row], name: str) -> Iterator[str]:
    """One JSON array, as AlpacaEval's `model_outputs`."""
    rows = []
    for one, answer in zip(asked, answers, strict=True):
        dataset = {"dataset": one.row["dataset"]} if "dataset" in one.row else {}
        instruction = one.row.get("instruction")
        is_all = isinstance(instruction, str) and not one.row.get("input")
        asks = instruction if is_all else answer["prompt"]
        rows.append({**dataset, "instruction": asks, "output": answer["answer"], "generator": name})
    yield _json(rows, indent=2) + "\n"


def _mt_bench(asked: Sequence[Asked], answers: Sequence[Row], name: str) -> Iterator[str]:
    """FastChat's `model_answer`: one line for each question, with the answers of all its turns."""
    for number, (one, answer) in enumerate(zip(asked, answers, strict=True)):
        earlier = answer["messages"][len(one.messages) :]
        turns = [each["content"] for each in earlier if each["role"] == "assistant"]
        question = one.row.get("question_id", number + 1)
        text = json.dumps([name, question, turns, answer["answer"]])
        yield line_of(
            {
                "question_id": question,
                "answer_id": hashlib.sha256(text.encode()).hexdigest()[:22],
                "model_id": name,
                "choices": [{"index": 0, "turns": [*turns, answer["answer"]]}],
                "tstamp": 0.0,  # FastChat does not read it, and answers are the same every time
            }
        )


def _openai(asked: Sequence[Asked], answers: Sequence[Row], name: str) -> Iterator[str]:
    """Chat messages with the answer as their last, as OpenAI's files for fine-tuning."""
    for answer in answers:
        said = {"role": "assistant", "content": answer["answer"]}
        yield line_of({"messages": [*answer["messages"], said]})


FORMATS: dict[str, Format] = {
    "jsonl": _jsonl,
    "alpaca-eval": _alpaca_eval,
    "mt-bench": _mt_bench,
    "openai": _openai,
}
OF_ONE_MODEL = frozenset({"alpaca-eval", "mt-bench", "openai"})
"""Formats that have no place for a second model's answers."""


def line_of(row: Row) -> str:
    """A row as one line of a file."""
    return _json(row) + "\n"


def _json(value: Any, indent: int | None = None) -> str:
    """JSON as UTF-8. Half a surrogate pair, which it cannot hold, stays an escape."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")
