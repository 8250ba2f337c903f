"""Pairs for the measurement of a step: random ones of a given shape, or those of a file."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from orpo_ray.config.data import Source
from orpo_ray.config.model import ModelConfig
from orpo_ray.data.checks import check_pair
from orpo_ray.data.formats import Reading, read_pairs
from orpo_ray.data.pairs import Pair, Refusal, TokenPair
from orpo_ray.data.rows import parse_row
from orpo_ray.data.sources import read_rows
from orpo_ray.data.tokenise import PairTokeniser
from orpo_ray.errors import ConfigError, DataError
from orpo_ray.models.tokenizer import load_tokenizer
from orpo_ray.runs.console import Announce

Shape = tuple[int, int, int]
"""Lengths in tokens of prompt, chosen answer and rejected answer."""

_SPECIAL_IDS = 4
"""The first ids of a vocabulary, such as padding, start and end. No pair holds them."""


def usable_pairs(file: str) -> Iterator[Pair]:
    """The good pairs of a file in any format that `orpo-ray prepare` recognises."""
    rows = (parse_row(raw.text, raw.problem) for raw in read_rows(Source(source=file)))
    found = (row if isinstance(row, Refusal) else read_pairs(row, Reading()) for row in rows)
    pairs = (pair for several in found if isinstance(several, list) for pair in several)
    return (pair for pair in pairs if check_pair(pair) is None)


def write_rows(path: Path, pairs: Iterable[Pair]) -> int:
    """Write pairs as JSON lines of chat messages, which both sides read; returns their number."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            count += 1
            row = {"prompt": pair.prompt, "chosen": [pair.chosen], "rejected": [pair.rejected]}
            file.write(json.dumps(row) + "\n")
    return count


def tokenizer_at(
    folder: str, announce: Announce, option: str = "--tokenizer"
) -> PreTrainedTokenizerBase:
    """The tokenizer that an option names. Raises ConfigError if it cannot be loaded."""
    try:
        return load_tokenizer(ModelConfig(base=folder), announce)
    except ConfigError as error:
        raise ConfigError(f"{option}: {str(error).removeprefix('model.base: ')}") from error


def pairs_of_shape(
    shape: Shape, count: int, ragged: float, vocabulary: int, seed: int = 0
) -> list[TokenPair]:
    """Pairs of random ids.

    With `ragged` r each length is drawn evenly from (1 - r) to (1 + r) times the shape's.
    """
    rng = np.random.default_rng(seed)
    low, high = (
        np.maximum(1, np.round(np.array(shape) * factor)).astype(int)
        for factor in (1 - ragged, 1 + ragged)
    )
    return [
        TokenPair.of_answers(
            f"drawn:{number}",
            *(
                rng.integers(_SPECIAL_IDS, vocabulary, length, dtype=np.int32)
                for length in rng.integers(low, high + 1)
            ),
        )
        for number in range(count)
    ]


def pairs_of_file(
    file: str,
    tokenizer_folder: str,
    *,
    max_length: int,
    count: int,
    vocabulary: int,
    announce: Announce,
) -> list[TokenPair]:
    """The first pairs of a file that fit into `max_length` tokens without truncation.

    Only lengths matter, so ids beyond the model's vocabulary are folded into it. Raises DataError
    if there are fewer than `count`.
    """
    tokeniser = PairTokeniser(tokenizer_at(tokenizer_folder, announce))
    usable = list(islice(usable_pairs(file), 4 * count))
    found = tokeniser.pairs(usable, [f"{file}:{number}" for number in range(len(usable))])
    fitting = [
        pair
        for pair in found
        if isinstance(pair, TokenPair)
        and len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= max_length
    ][:count]
    if len(fitting) < count:
        raise DataError(
            f"{file}: {len(fitting)} pairs fit into {max_length} tokens, but {count} are needed; "
            "add pairs, or raise --max-length"
        )
    return [
        TokenPair.of_answers(
            pair.pair_id,
            *(_folded(ids, vocabulary) for ids in (pair.prompt, pair.chosen, pair.rejected)),
        )
        for pair in fitting
    ]


def _folded(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    folded: np.ndarray = (_SPECIAL_IDS + ids % (vocabulary - _SPECIAL_IDS)).astype(np.int32)
    return folded
