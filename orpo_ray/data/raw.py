"""The rows of a run's sources as they are, before their content is interpreted.

A first reading hashes every source. Files that have parts are left where they are, and workers read
their parts. The rows of other sources are kept if they are few, else read a second time.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import pyarrow as pa

from orpo_ray.config.data import Columns, DataConfig, Source
from orpo_ray.data.parts import CutFile, cut_file
from orpo_ray.data.readers import RawRow
from orpo_ray.data.rows import SNIFFED_ROWS, lacks_columns, raw_blocks, some_of, unused_in
from orpo_ray.data.sources import local_file, not_read_of, one_by_one, read_rows, source_labels
from orpo_ray.errors import DataError
from orpo_ray.runs.console import Announce

_KEPT_BYTES = 64 * 2**20
"""Rows of sources without parts stay in memory up to this size, for all sources together."""


@dataclass(frozen=True, kw_only=True)
class RawSource:
    """One source: its first rows, the hash of its content, and where the rest is read from.

    `size` is in bytes. `rows` is None if they are not counted. `cut` is None if the rows must be
    read one after the other, and `kept` is None if they are not in memory.
    """

    number: int
    source: Source
    label: str
    split: str
    digest: str
    size: int
    rows: int | None
    first: Sequence[RawRow]
    cut: CutFile | None = None
    kept: Sequence[pa.Table] | None = None

    def blocks(self) -> Iterator[pa.Table]:
        """All rows as RAW blocks. Raises DataError if the source is not as it was."""
        if self.kept is not None:
            yield from self.kept
            return
        content = _Content()
        yield from raw_blocks(content.through(read_rows(self.source)), self.number)
        if content.digest != self.digest:
            raise ChangedError(self.source.source)


class _Content:
    """The hash, size and number of the rows that pass through it."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.size = 0
        self.rows = 0

    def through(self, rows: Iterator[RawRow]) -> Iterator[RawRow]:
        for row in rows:
            self._hash.update(f"{row.line}:{row.problem}:{len(row.text)}:".encode() + row.text)
            self.size += len(row.text)
            self.rows += 1
            yield row

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


class ChangedError(DataError):
    """A source was written to between its two readings."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: it changed while it was being prepared; start again")


def read_all(data: DataConfig) -> list[RawSource]:
    """Every source of a config, the training ones first.

    Raises DataError for what cannot be read.
    """
    named = [("train", source) for source in data.train]
    named += [("eval", source) for source in data.eval]
    files = [(split, one_by_one(source)) for split, source in named]
    labels = iter(source_labels([file for _, group in files for file in group]))
    found: list[RawSource] = []
    room = _KEPT_BYTES
    for split, group in files:
        left = group[0].limit
        for file in group:
            limited = file.model_copy(update={"limit": left})
            raw = _read_source(len(found), limited, next(labels), split, room)
            if not raw.size and left != 0:
                raise DataError(f"{file.source}: no rows in it")
            room -= raw.size if raw.kept else 0
            if left is not None:
                assert raw.rows is not None, "a source with a limit is counted"
                left -= raw.rows
            found.append(raw)
    return found


def _read_source(number: int, source: Source, label: str, split: str, room: int) -> RawSource:
    """Read a source once; its rows are kept if they take at most `room` bytes."""
    raw = partial(RawSource, number=number, source=source, label=label, split=split)
    file = local_file(source)
    cut = None if file is None or source.limit is not None else cut_file(file.absolute())
    if cut is not None:
        first = list(islice(read_rows(source), SNIFFED_ROWS))
        return raw(digest=cut.digest, size=cut.size, rows=None, first=first, cut=cut)
    content = _Content()
    first = []
    kept: list[pa.Table] | None = []
    for block in raw_blocks(content.through(read_rows(source)), number):
        if len(first) < SNIFFED_ROWS:
            some = block.slice(0, SNIFFED_ROWS - len(first)).to_pylist()
            first += [RawRow(row["line"], row["text"], row["problem"]) for row in some]
        if content.size > room:
            kept = None
        elif kept is not None:
            kept.append(block)
    return raw(digest=content.digest, size=content.size, rows=content.rows, first=first, kept=kept)


def check_columns(sources: Sequence[RawSource], columns: Columns, announce: Announce) -> None:
    """Raise DataError if no source has the named columns.

    Announces the sources that do not have them.
    """
    found = [(raw.source.source, lacks_columns(raw.first, columns)) for raw in sources]
    lacking = [(name, why) for name, why in found if why is not None]
    if len(lacking) == len(found):
        name, why = lacking[0]
        raise DataError(f"data.columns: {name}: {why}")
    for name, why in lacking:
        announce(f"data.columns do not apply to {name} ({why}); its shape is recognised")


def announce_not_read(data: DataConfig, announce: Announce) -> None:
    """Announce, for each source that is a folder, the names in it of which nothing is read."""
    for source in {source.source: source for source in (*data.train, *data.eval)}.values():
        if names := not_read_of(source):
            announce(f"{source.source}: not read: {some_of(names)}")


def announce_unused(
    sources: Sequence[RawSource], columns: Columns | None, announce: Announce
) -> dict[str, list[str]]:
    """Announce and return, for each file or dataset, the columns that no pair uses.

    The first rows tell them. `summary.describe_unused` names those of later rows.
    """
    found = {raw.source.source: unused_in(raw.first, columns) for raw in reversed(sources)}
    for name in dict.fromkeys(raw.source.source for raw in sources):
        if found[name]:
            announce(f"{name}: columns that are not used: {some_of(found[name])}")
    return found
