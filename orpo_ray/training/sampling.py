"""How answers are made: how each token is chosen, and which prompts are answered together."""

from collections.abc import Sequence
from dataclasses import dataclass

from orpo_ray.errors import ConfigError

SAMPLE_TOKENS = 64
"""The most tokens of an answer at an evaluation: enough to see its style and whether it ends."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How each next token is chosen.

    With a temperature of 0 it is the likeliest one. Else it is drawn from the likeliest ones, which
    together have a probability of `top_p`. Raises ConfigError for numbers out of range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: must be 1 or more, not {self.max_new_tokens}")
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise ConfigError(f"temperature: must be a number from 0 on, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: must be above 0 and at most 1, not {self.top_p}")


@dataclass(frozen=True)
class Room:
    """The longest answer, the tokens of a batch, and how many tokens the base reads, if known."""

    max_new_tokens: int
    batch_tokens: int
    positions: int | None = None


def cut_batches(lengths: Sequence[int], room: Room) -> list[list[int]]:
    """Numbers of prompts, in batches of at most `batch_tokens`; similar lengths go together.

    An answer counts with its full length, and a prompt with its padding. A prompt that alone takes
    more is a batch of its own. So is one that leaves less room than the longest answer takes: it
    would cut the other answers.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        widest = lengths[number] + room.max_new_tokens
        is_tight = room.positions is not None and widest > room.positions
        fits = not is_tight and bool(batches)
        if fits and widest * (len(batches[-1]) + 1) <= room.batch_tokens:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches
