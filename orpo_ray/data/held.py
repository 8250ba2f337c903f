"""Token pairs in memory, for what is scored once and kept nowhere."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from orpo_ray.data.pairs import TokenPair


class Pairs(Protocol):
    """What scoring asks of its pairs: `store.PairTable` has them on disk, HeldPairs in memory."""

    def __len__(self) -> int:
        """The number of pairs."""

    def __getitem__(self, index: int) -> TokenPair:
        """The pair at a place."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Token counts [n, 3] of prompt, chosen and rejected."""

    @property
    def trained(self) -> npt.NDArray[np.int64]:
        """Numbers of trained tokens [n, 3] of prompt, chosen and rejected."""

    @property
    def pair_ids(self) -> list[str]:
        """What tells the pairs apart."""

    @property
    def largest_token_id(self) -> int:
        """The largest token id, or 0 if there is none."""


class HeldPairs:
    """Pairs that were tokenised just now."""

    def __init__(self, pairs: Sequence[TokenPair]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> TokenPair:
        return self._pairs[int(index)]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Token counts [n, 3] of prompt, chosen and rejected."""
        counts = [[len(side) for side in _sides(pair)] for pair in self._pairs]
        return np.array(counts, dtype=np.int64).reshape(-1, 3)

    @property
    def trained(self) -> npt.NDArray[np.int64]:
        """Numbers of trained tokens [n, 3] of prompt, chosen and rejected."""
        counts = [pair.trained.counts for pair in self._pairs]
        return np.array(counts, dtype=np.int64).reshape(-1, 3)

    @property
    def pair_ids(self) -> list[str]:
        """What tells the pairs apart."""
        return [pair.pair_id for pair in self._pairs]

    @property
    def largest_token_id(self) -> int:
        """The largest token id, or 0 if there is none."""
        sides = (side for pair in self._pairs for side in _sides(pair))
        return max((int(side.max()) for side in sides if len(side)), default=0)


def _sides(pair: TokenPair) -> tuple[npt.NDArray[np.int32], ...]:
    return pair.prompt, pair.chosen, pair.rejected
