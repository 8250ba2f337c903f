"""The rows of a run's sources as they are, before their content is interpreted."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from orpo_ray.config.data import Columns, DataConfig, Source
from orpo_ray.data.rows import RAW, lacks_columns, unused_in
from orpo_ray.data.sources import RawRow, one_by_one, read_rows, source_labels
from orpo_ray.errors import DataError
from orpo_ray.runs.console import Announce

_BLOCK_ROWS = 512
_BLOCK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class RawSource:
    """All raw rows of one source, and the hash of their content."""

    source: Source
    label: str
    split: str
    blocks: list[pa.Table]
    digest: str

    @property
    def rows(self) -> int:
        """The number of rows."""
        return sum(block.num_rows for block in self.blocks)

    def __iter__(self) -> Iterator[RawRow]:
        for block in self.blocks:
            for row in block.to_pylist():
                yield RawRow(row["line"], row["text"], row["problem"])


def read_all(data: DataConfig) -> list[RawSource]:
    """Every source of a config, the training ones first.

    Raises DataError for what cannot be read.
    """
    named = [("train", source) for source in data.train]
    named += [("eval", source) for source in data.eval]
    files = [(split, one_by_one(source)) for split, source in named]
    labels = iter(source_labels([file for _, group in files for file in group]))
    found: list[RawSource] = []
    for split, group in files:
        left = group[0].limit
        for file in group:
            limited = file.model_copy(update={"limit": left})
            raw = _read_source(len(found), limited, next(labels), split, may_be_empty=left == 0)
            left = None if left is None else left - raw.rows
            found.append(raw)
    return found


def _read_source(
    number: int, source: Source, label: str, split: str, *, may_be_empty: bool
) -> RawSource:
    content = hashlib.sha256()
    blocks: list[pa.Table] = []
    open_rows: list[dict[str, Any]] = []
    size = 0
    for row in read_rows(source):
        content.update(f"{row.line}:{row.problem}:{len(row.text)}:".encode() + row.text)
        open_rows.append(
            {"source": number, "line": row.line, "text": row.text, "problem": row.problem}
        )
        size += len(row.text)
        if len(open_rows) == _BLOCK_ROWS or size > _BLOCK_BYTES:
            blocks.append(pa.Table.from_pylist(open_rows, schema=RAW))
            open_rows, size = [], 0
    if open_rows:
        blocks.append(pa.Table.from_pylist(open_rows, schema=RAW))
    if not blocks and not may_be_empty:
        raise DataError(f"{source.source}: no rows in it")
    return RawSource(
        source=source, label=label, split=split, blocks=blocks, digest=content.hexdigest()
    )


def check_columns(sources: Sequence[RawSource], columns: Columns, announce: Announce) -> None:
    """Raise DataError if no source has the named columns.

    Announces the sources that do not have them.
    """
    found = [(raw.source.source, lacks_columns(raw, columns)) for raw in sources]
    lacking = [(name, why) for name, why in found if why is not None]
    if len(lacking) == len(found):
        name, why = lacking[0]
        raise DataError(f"data.columns: {name}: {why}")
    for name, why in lacking:
        announce(f"data.columns do not apply to {name} ({why}); its shape is recognised")


def announce_unused(
    sources: Sequence[RawSource], columns: Columns | None, announce: Announce
) -> None:
    """Announce, for each file or dataset, the columns that no pair uses."""
    by_name: dict[str, RawSource] = {}
    for raw in sources:
        by_name.setdefault(raw.source.source, raw)
    for name, raw in by_name.items():
        if unused := unused_in(raw, columns):
            announce(f"{name}: columns that are not used: {', '.join(unused)}")
