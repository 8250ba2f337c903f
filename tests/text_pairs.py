"""Pairs whose answers are texts, as tests write most of them."""

from orpo_ray.config.data import Columns
from orpo_ray.data.formats import Reading, read_pairs
from orpo_ray.data.pairs import Message, Pair, Refusal, Row


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def text_pair(prompt: list[Message], chosen: str, rejected: str) -> Pair:
    """A prompt and two answers that have nothing but a text."""
    return Pair(prompt, assistant(chosen), assistant(rejected))


def read_pair(
    row: Row, columns: Columns | None = None, single_answers: bool = False
) -> Pair | Refusal:
    """The only pair in a row, or why there is none."""
    found = read_pairs(row, Reading(columns, single_answers=single_answers))
    if isinstance(found, Refusal):
        return found
    [pair] = found
    return pair
