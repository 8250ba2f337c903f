"""How long the pairs of a run are: as prepared, from a sample of the rows, or assumed."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml

from orpo_ray.config import RunConfig
from orpo_ray.config.data import DataConfig, Source
from orpo_ray.config.model import ModelConfig
from orpo_ray.config.storage import expanded
from orpo_ray.data.formats import Reading, read_pairs
from orpo_ray.data.pairs import Message, Pair, Refusal
from orpo_ray.data.ranked import Ranking
from orpo_ray.data.readers import RawRow
from orpo_ray.data.sources import local_file, one_by_one, read_by_share, refuse_missing, stated_rows
from orpo_ray.data.store import MANIFEST, open_artifact
from orpo_ray.errors import ConfigError, DataError, on_one_line
from orpo_ray.training.plan import Indices, longer_side

_SAMPLE = 2000
"""Rows of each source whose lengths are taken."""
_COUNTED = 2**24
"""Bytes of each source whose rows are counted one by one. The rest counts by its size."""
_CHARACTERS = 4.0
"""Of a token, where the base's tokenizer is not here: OpenAI's and Meta's rule for English."""
_MARKS, _HEADER, _LAST = 5, 3, 1
"""Tokens that a chat template writes around a turn, as ChatML has them.

Three are before its text, which the prompt has of the answer's turn. After the last turn's end
nothing is trained, so its line feed is left out.
"""
_SHARES = (0.25, 0.5, 0.75, 1.0, 1.25, 2.25)
"""Lengths that are assumed spread about their mean like this; the mean of these is 1."""
_REPEATED = 50
"""So many pairs of each of these lengths are assumed, so that a pack and a step find enough."""


_LIMITS = (
    "max_length",
    "max_prompt_length",
    "overlong",
    "pairs",
    "min_margin",
    "train_on",
    "dedup",
)
"""Settings that decide which pairs are left."""


class Tokens(Protocol):
    """Counts the tokens of texts."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """(prompt, chosen, rejected) lengths [n, 3] of pairs, some or all that are trained.

    `pairs` and `held_out` count them all; `pairs` is None if nobody knows. `source` says where the
    lengths are from.
    """

    lengths: Indices
    pairs: int | None
    held_out: int
    source: str
    is_assumed: bool = False


def find_lengths(config: RunConfig) -> Lengths:
    """The lengths of a run's pairs, from the nearest place that has them."""
    return _prepared(config) or _sampled(config) or _assumed(config.data)


def _prepared(config: RunConfig) -> Lengths | None:
    """From prepared pairs with the same sources and limits, those that were prepared last."""
    found = config.storage_dir.glob(f"artifacts/*/{MANIFEST}")
    for path in sorted(found, key=lambda each: each.stat().st_mtime, reverse=True):
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            if not _is_of(summary, config):
                continue
            artifact = open_artifact(path.parent)
        except (OSError, ValueError, KeyError, TypeError, DataError):
            continue  # a damaged one: `prepare` says so and builds it again
        lengths = artifact.train.lengths
        return Lengths(
            lengths=lengths,
            pairs=len(lengths),
            held_out=len(artifact.eval),
            source=f"prepared pairs in {path.parent}",
        )
    return None


def _is_of(summary: dict[str, Any], config: RunConfig) -> bool:
    """Whether an artifact's summary says that it was made from these sources, with these limits."""
    data = config.data
    own = [(each, "train") for each in data.train] + [(each, "eval") for each in data.eval]
    wanted = [
        (one.model_dump(mode="json"), split) for each, split in own for one in _files_of(each)
    ]
    found = [
        ({key: source.get(key) for key in Source.model_fields}, source.get("used_for"))
        for source in summary["sources"]
    ]
    columns = data.columns and data.columns.model_dump(mode="json", exclude_none=True)
    settings = {
        **{name: getattr(data, name) for name in _LIMITS},
        "columns": columns,
        "eval_fraction": None if data.eval else data.eval_fraction,
        "single_answers": config.objective.reads_single_answers,
    }
    is_whole = "subset" not in summary["settings"]
    return is_whole and found == wanted and settings.items() <= summary["settings"].items()


def _files_of(source: Source) -> list[Source]:
    try:
        return one_by_one(source)
    except DataError:
        return [source]


def _sampled(config: RunConfig) -> Lengths | None:
    """From the first rows of files that are here."""
    data = config.data
    for source in (*data.train, *data.eval):
        refuse_missing(source)
    train = [one for each in data.train for one in _files_of(each)]
    held = [one for each in data.eval for one in _files_of(each)]
    if any(local_file(each) is None for each in (*train, *held)):
        return None
    tokenizer = _tokenizer_of(config.model)
    tokens: Tokens = _Exact(tokenizer) if tokenizer else _ByCharacters()
    reading = Reading(
        data.columns,
        Ranking(data.pairs, data.min_margin),
        config.objective.reads_single_answers,
        data.train_on == "all-assistant",
    )
    samples = [_Sample(each, reading) for each in train]
    read = list(itertools.chain.from_iterable(sample.found for sample in samples))
    found = _without_doubles(read)
    rows = round(sum(sample.pairs for sample in samples) * len(found) / max(1, len(read)))
    held_out = sum(_Sample(each, reading).pairs for each in held)
    if not held:
        held_out = round(rows * data.eval_fraction)
        rows -= held_out
    if not found:
        raise DataError(
            f"data.train: the first rows of {', '.join(each.source for each in data.train)} hold "
            "no pair that can be read; orpo-ray prepare says why"
        )
    how = f"read by {tokenizer}" if tokenizer else f"{_CHARACTERS:g} characters taken for a token"
    every = Lengths(
        lengths=_count(found, tokens),
        pairs=rows,
        held_out=held_out,
        source=f"the first {len(found)} pairs, {how}",
    )
    left = _within(every, data)
    if not len(left.lengths):
        raise DataError(
            f"data.max_length: no pair has at most {data.max_length} tokens, and "
            f"{data.max_prompt_length} of them in its prompt ({every.source}); raise it"
        )
    return left


def _without_doubles(pairs: Sequence[Pair]) -> list[Pair]:
    """Each pair once, as the preparation keeps it."""
    return list({json.dumps([pair.prompt, pair.answers]): pair for pair in pairs}.values())


class _Sample:
    """The first pairs of one file, and how many it holds."""

    def __init__(self, source: Source, reading: Reading) -> None:
        rows = read_by_share(source)
        first = [row.text for row, _ in itertools.islice(rows, _SAMPLE)]
        self.found = list(_pairs_of(first, reading))
        count = self._count(source, rows, len(first))
        kept = len(self.found) / max(1, len(first))
        self.pairs = round(count * kept * source.weight)

    @staticmethod
    def _count(source: Source, rest: Iterator[tuple[RawRow, float]], first: int) -> float:
        """The rows of the file: stated, counted, or by the size of those that are counted."""
        file = local_file(source)
        stated = file and stated_rows(file)
        count = float(stated or first)
        counted = _COUNTED if stated is None else 0
        for row, share in rest if counted else ():
            count += 1
            counted -= len(row.text)
            if counted < 0 and share < 1:
                count /= share
                break
        return min(count, source.limit or count)


def _pairs_of(texts: Sequence[bytes], reading: Reading) -> Iterator[Pair]:
    for text in texts:
        try:
            row = json.loads(text)
        except ValueError:
            continue  # a bad row, which the preparation reports
        found = read_pairs(row, reading) if isinstance(row, dict) else None
        if found is not None and not isinstance(found, Refusal):
            yield from found


def _tokenizer_of(model: ModelConfig) -> Path | None:
    """The tokenizer.json of a base that is a folder, or in the hub's cache."""
    path = expanded(model.base, "model.base") / "tokenizer.json"
    if path.is_file():
        return path
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(model.base, "tokenizer.json", revision=model.revision)
    except ValueError:  # no name of the hub
        return None
    return Path(cached) if isinstance(cached, str) else None


class _Exact:
    """Counts by a base's own tokenizer."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more special
            raise ConfigError(f"model.base: {path} cannot be read: {on_one_line(error)}") from error
        # Many a file says how batches are padded and cut, which would make all texts equally long.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def count(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has."""
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [len(one.ids) for one in found]


class _ByCharacters:
    """Counts by the usual length of a token."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, about."""
        return [round(len(text) / _CHARACTERS) for text in texts]


def _count(pairs: Sequence[Pair], tokens: Tokens) -> Indices:
    """(prompt, chosen, rejected) lengths [n, 3] of pairs."""
    sides = [
        (pair.prompt, *(pair.answers.get(side, []) for side in ("chosen", "rejected")))
        for pair in pairs
    ]
    counts = tokens.count([_text(turns) for side in sides for turns in side])
    around = (_HEADER, -_HEADER - _LAST, -_HEADER - _LAST)
    marks = [
        (_MARKS * len(turns) + more) * bool(turns)
        for side in sides
        for turns, more in zip(side, around, strict=True)
    ]
    lengths: Indices = np.array(counts, dtype=np.int64) + np.array(marks, dtype=np.int64)
    return lengths.reshape(-1, 3)


def _text(turns: Sequence[Message]) -> str:
    return "\n".join(turn["content"] for turn in turns)


def _within(found: Lengths, data: DataConfig) -> Lengths:
    """The lengths of pairs that `data.max_length` leaves, perhaps none."""
    lengths = found.lengths
    if data.overlong == "truncate-prompt-left":
        room = np.minimum(data.max_prompt_length, data.max_length - lengths[:, 1:].max(axis=1))
        prompt = np.minimum(lengths[:, 0], room)
        lengths = np.column_stack([prompt, lengths[:, 1:]])[prompt > 0]
    elif data.overlong == "drop":
        fits = longer_side(lengths) <= data.max_length
        lengths = lengths[fits & (lengths[:, 0] <= data.max_prompt_length)]
    kept = len(lengths) / len(found.lengths)
    return replace(
        found,
        lengths=lengths,
        pairs=None if found.pairs is None else max(1, round(kept * found.pairs)),
        held_out=round(kept * found.held_out),
    )


@cache
def _datasets() -> dict[str, Any]:
    text = files(__package__).joinpath("datasets.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def _assumed(data: DataConfig) -> Lengths:
    """The usual lengths, and rows as the cards of well-known data sets say."""
    usual = _datasets()["usual"]
    shares = np.tile(np.array(_SHARES), _REPEATED)
    lengths = np.column_stack([np.round(usual[side] * shares) for side in usual]).astype(np.int64)
    # The longest pair that the run allows may come: memory follows it.
    longest = [data.max_prompt_length, *2 * [data.max_length - data.max_prompt_length]]
    rows = _sum([_rows(each) for each in data.train])
    evaluated = _sum([_rows(each) for each in data.eval])
    found = _within(
        Lengths(lengths=lengths, pairs=rows, held_out=evaluated or 0, source="", is_assumed=True),
        data,
    )
    pairs, held_out = found.pairs, found.held_out
    if pairs is not None and not data.eval:
        held_out = round(pairs * data.eval_fraction)
        pairs -= held_out
    short = len(found.lengths) / len(lengths)
    said = ["/".join(str(usual[side]) for side in usual) + " tokens of prompt, chosen and rejected"]
    said[0] += f" on average, and one pair of {data.max_length}"
    if rows is not None:
        left = f", {short:.0%} of them short enough" if short < 1 else ""
        said.append(f"{rows:,} rows by what the config and the card of the data set say{left}")
    if evaluated is None:
        said.append("none held out, because nobody knows how many there are")
    return replace(
        found,
        lengths=np.vstack([found.lengths, longest]),
        pairs=pairs,
        held_out=held_out,
        source=f"assumed: {'; '.join(said)}; orpo-ray prepare tells",
    )


def _rows(source: Source) -> int | None:
    """The rows of a known data set's split."""
    known = _datasets()["rows"].get(source.source, {}).get(source.split)
    rows = source.limit if known is None else min(known, source.limit or known)
    return None if rows is None else round(rows * source.weight)


def _sum(counts: Sequence[int | None]) -> int | None:
    return None if None in counts else sum(count for count in counts if count is not None)
