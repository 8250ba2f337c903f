"""Near-duplicates: training pairs with nearly the words of an evaluation pair, found by MinHash.

The library is datasketch. Words are compared in groups of three, so their order counts.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from zlib import crc32

import numpy as np
import numpy.typing as npt
from datasketch import MinHash, MinHashLSH

from orpo_ray.data.pairs import Pair

NEAR = 0.8
"""From this share of common groups of words on (Jaccard), two pairs are nearly equal."""
_PERMUTATIONS, _SEED, _SCHEME = 64, 1, "affine32"
_GROUP = 3


def signature(pair: Pair) -> bytes:
    """The MinHash of a pair's prompt, without its system turn, and of its chosen answer."""
    texts = [turn["content"] for turn in pair.prompt if turn["role"] != "system"]
    words = " ".join([*texts, pair.chosen["content"]]).lower().split()
    last = max(1, len(words) - _GROUP + 1)
    groups = {" ".join(words[start : start + _GROUP]).encode() for start in range(last)}
    found = _empty().copy()
    found.update_batch(groups)
    return bytes(found.hashvalues.tobytes())


def are_near(training: Iterable[bytes], evaluation: Sequence[bytes]) -> npt.NDArray[np.bool_]:
    """For each training pair's signature, whether an evaluation pair is nearly equal."""
    index = MinHashLSH(threshold=NEAR, num_perm=_PERMUTATIONS)
    known = [_restored(each) for each in evaluation]
    for number, each in enumerate(known):
        index.insert(number, each)
    return np.array([_is_near(_restored(each), index, known) for each in training], dtype=bool)


def _is_near(one: MinHash, index: MinHashLSH, known: Sequence[MinHash]) -> bool:
    return any(one.jaccard(known[number]) >= NEAR for number in index.query(one))


@cache
def _empty() -> MinHash:
    return MinHash(num_perm=_PERMUTATIONS, seed=_SEED, scheme=_SCHEME, hashfunc=crc32)


def _restored(signature: bytes) -> MinHash:
    values = np.frombuffer(signature, dtype=_empty().hashvalues.dtype)
    return MinHash(
        num_perm=_PERMUTATIONS,
        seed=_SEED,
        scheme=_SCHEME,
        hashvalues=values,
        permutations=_empty().permutations,
    )
