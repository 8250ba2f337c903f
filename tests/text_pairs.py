"""Pairs whose answers are texts, as tests write most of them."""

from orpo_ray.data.pairs import Message, Pair


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def text_pair(prompt: list[Message], chosen: str, rejected: str) -> Pair:
    """A prompt and two answers that have nothing but a text."""
    return Pair(prompt, assistant(chosen), assistant(rejected))
