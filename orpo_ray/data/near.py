"""Near-duplicates: training pairs with nearly the words of an evaluation pair.

They are found by MinHash (Broder, "On the resemblance and containment of documents", 1997). Words
are compared in groups of three, so their order counts.
"""

from collections.abc import Sequence
from itertools import pairwise
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orpo_ray.data.pairs import Pair

NEAR = 0.8
"""From this share of common groups of words on (Jaccard), two pairs are nearly equal."""
_HASHES = 64
_draw = np.random.Generator(np.random.PCG64(0))
# Odd multipliers: then each hash is a permutation of the 32-bit numbers.
_MULTIPLIERS = _draw.integers(2**32, size=(_HASHES, 1), dtype=np.uint32) | np.uint32(1)
_OFFSETS = _draw.integers(2**32, size=(_HASHES, 1), dtype=np.uint32)
_GROUP = 3
_NO_WORD = " \0"
_FACTOR = np.uint32(0x9E3779B1)
"""An odd number of 32 bits, so that the order of the words in a group counts."""
_BANDS = 16
"""Signatures that share none of their 16 bands of four hashes are not compared.

Of two pairs that share 0.8 of their groups, one in 5,000 is missed by that.
"""
_MOST_ALIKE = 64
"""A band that more evaluation pairs share is that of a common template and tells nothing."""
Hashes = npt.NDArray[np.uint32]
Signatures = Hashes
"""MinHash values, [n, 64]."""


def signatures(pairs: Sequence[Pair]) -> list[bytes]:
    """The MinHash of each pair's prompt, without its system turn, and of its better answer."""
    words = pc.ascii_split_whitespace(pa.array(map(_text, pairs), pa.large_string()))
    hashes = _hashes_of(words.flatten())
    groups = np.zeros(max(0, len(hashes) - _GROUP + 1), dtype=np.uint32)
    for place in range(_GROUP):
        groups = groups * _FACTOR + hashes[place : place + len(groups)]
    groups = _mixed(groups)
    # The groups at the end of a pair reach into the next one, and are left out.
    own = (groups[start : stop - _GROUP + 1] for start, stop in pairwise(words.offsets.to_pylist()))
    return [_min_hash(some).tobytes() for some in own]


def _min_hash(groups: Hashes) -> Hashes:
    """The least of each hash of the groups, [64]."""
    hashes = _MULTIPLIERS * groups
    hashes += _OFFSETS  # in place: a second array of this size takes as long as all hashes
    least: Hashes = hashes.min(axis=1)
    return least


def _text(pair: Pair) -> str:
    """The words of a pair in small letters, at least as many as a group has."""
    texts = [turn["content"] for turn in pair.prompt if turn["role"] != "system"]
    answer = next(iter(pair.answers.values()))
    text = " ".join([*texts, *(turn["content"] for turn in answer)]).lower().strip()
    # Bytes are split as Arrow splits texts: at white space of ASCII alone.
    return text + _NO_WORD * (_GROUP - len(text.encode().split(maxsplit=_GROUP - 1)))


def _hashes_of(words: pa.LargeStringArray) -> Hashes:
    """A hash of each word. Each different word is hashed once: most come often."""
    coded = words.dictionary_encode()
    different = map(str.encode, coded.dictionary.to_pylist())
    found: Hashes = np.fromiter(map(crc32, different), dtype=np.uint32)[coded.indices.to_numpy()]
    return found


def _mixed(values: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The finaliser of MurmurHash3: without it, like groups would have like hashes."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        values = (values ^ (values >> np.uint32(shift))) * np.uint32(factor)
    return values ^ (values >> np.uint32(16))


def read_signatures(packed: list[bytes]) -> Signatures:
    """What `signatures` has made."""
    return np.frombuffer(b"".join(packed), dtype=np.uint32).reshape(-1, _HASHES)


class NearIndex:
    """Finds the signatures that are near one of those it is made of."""

    def __init__(self, known: Signatures) -> None:
        self._known = np.unique(known, axis=0)
        keys = _band_keys(self._known)
        self._order = np.argsort(keys, axis=0)
        self._keys = np.take_along_axis(keys, self._order, axis=0)

    def are_near(self, asked: Signatures) -> npt.NDArray[np.bool_]:
        """Whether each signature is near a known one."""
        near = np.zeros(len(asked), dtype=bool)
        for band, keys in enumerate(_band_keys(asked).T):
            first, last = (
                np.searchsorted(self._keys[:, band], keys, side) for side in ("left", "right")
            )
            for row in np.flatnonzero((last > first) & (last - first <= _MOST_ALIKE) & ~near):
                alike = self._known[self._order[first[row] : last[row], band]]
                near[row] = (alike == asked[row]).mean(axis=1).max() >= NEAR
        return near


def _band_keys(signatures: Signatures) -> npt.NDArray[np.uint64]:
    """One number for each band, [n, 16]; equal bands have equal numbers."""
    bands = signatures.reshape(-1, _BANDS, _HASHES // _BANDS).astype(np.uint64)
    weights = np.random.default_rng(0).integers(2**63, size=bands.shape[2], dtype=np.uint64)
    keys: npt.NDArray[np.uint64] = (bands * weights).sum(axis=2, dtype=np.uint64)
    return keys
