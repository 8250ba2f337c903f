"""The runs of tokens of a row, and which keys the tokens of a run see.

A row is cut into runs of tokens. The tokens of a run see one another causally. If a run shares a
prompt, its tokens also see the first tokens of the run before it. If all prompts of a row begin
alike, that beginning is the first run, and the tokens of all others see it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 256
"""So many queries at least look back together, where each sees only a window of the keys."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The runs of a row in order.

    Run i has `lengths[i]` tokens, which also see `shared[i]` tokens before them: the `common` ones
    that the row begins with, then the first tokens of run i - 1. These are plain numbers, so that
    reading them does not wait for the device. `query_ends` and `key_ends` [runs + 1] say the same
    to kernels, on the device.
    """

    lengths: tuple[int, ...]
    shared: tuple[int, ...]
    query_ends: Tensor
    key_ends: Tensor
    common: int = 0

    @staticmethod
    def of(runs: list[tuple[int, int]], common: int = 0) -> "Runs":
        """From (length, shared) of each run; with `common` tokens, these are the first run."""
        lengths, shared = zip(*runs, strict=True)
        queries = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        keys = queries + torch.tensor([0, *shared]).cumsum(0, dtype=torch.int32)
        return Runs(
            lengths=lengths, shared=shared, query_ends=queries, key_ends=keys, common=common
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> "Runs":
        """The same runs with their tensors on another device."""
        return replace(
            self,
            query_ends=self.query_ends.to(device, non_blocking=non_blocking),
            key_ends=self.key_ends.to(device, non_blocking=non_blocking),
        )

    @property
    def longest(self) -> int:
        """How many keys the last token of a run sees at most."""
        return max(
            length + shared for length, shared in zip(self.lengths, self.shared, strict=True)
        )

    def keys(self, values: Tensor, dim: int) -> list[Tensor]:
        """The keys or values that each run sees, from those of the row."""
        # Split, not sliced: the gradient of each slice would be as long as the row.
        pieces = values.split(self.lengths, dim)
        return [
            torch.cat([*self._before(pieces, i, dim), piece], dim) if shared else piece
            for i, (piece, shared) in enumerate(zip(pieces, self.shared, strict=True))
        ]

    def _before(self, pieces: tuple[Tensor, ...], run: int, dim: int) -> list[Tensor]:
        """What run number `run` sees before its own tokens."""
        of_prompt = self.shared[run] - self.common
        before = pieces[:1] if self.common else ()
        prompt = (pieces[run - 1].narrow(dim, 0, of_prompt),) if of_prompt else ()
        return [*before, *prompt]

    def positions(self, device: torch.device) -> Tensor:
        """The place of each token in its own text, [T]: a prompt that is shared comes before it."""
        return torch.cat(
            [
                torch.arange(shared, shared + length, device=device)
                for length, shared in zip(self.lengths, self.shared, strict=True)
            ]
        )


class Reach(NamedTuple):
    """How far back a token sees: `window` tokens with itself, and those of its `chunk` of places.

    None is no limit.
    """

    window: int | None = None
    chunk: int | None = None

    def within(self, longest: int) -> "Reach":
        """The same for texts of so many tokens at most: a limit that none of them meets is none."""
        window, chunk = (
            None if limit is None or limit >= longest else limit
            for limit in (self.window, self.chunk)
        )
        return Reach(window, chunk)


ALL_BEFORE = Reach()


class Block(NamedTuple):
    """Queries [start, stop) of a run, and the first of the run's keys that they see.

    `window` is None if each of them sees all keys from there to itself.
    """

    start: int
    stop: int
    first: int
    window: int | None


def blocks_of(length: int, shared: int, reach: Reach) -> Iterator[Block]:
    """The queries of a run in blocks that see few keys in vain.

    The run has `length` tokens after a shared prompt of `shared` tokens.
    """
    start, total = 0, shared + length
    while start < length:
        place = shared + start
        first, end = 0, total
        if reach.chunk is not None:
            first = place - place % reach.chunk
            end = min(end, first + reach.chunk)
        if reach.window is not None:
            end = min(end, place + max(reach.window, _BLOCK))
            first = max(first, place - reach.window + 1)
        is_cut = reach.window is not None and end - first > reach.window
        yield Block(start, end - shared, first, reach.window if is_cut else None)
        start = end - shared
