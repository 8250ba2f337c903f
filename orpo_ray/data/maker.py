"""Makes the shards of an artifact, in this process or in a worker of Ray.

A task is one shard. It carries the rows, or the worker reads them from a part of a file.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from orpo_ray import errors
from orpo_ray.config.storage import local_path
from orpo_ray.data.parts import Part
from orpo_ray.data.raw import ChangedError, RawSource
from orpo_ray.data.rows import RAW, RESULT, RowProcessor, raw_blocks
from orpo_ray.data.shards import Place, Shard, pack, save
from orpo_ray.errors import OrpoRayError
from orpo_ray.storage import Storage

TASK = pa.schema([*RAW, ("piece", pa.int32())])
"""The raw rows of one shard, or one row without text: then the worker reads the shard's part."""

MADE = pa.schema(
    [
        ("source", pa.int32()),
        ("piece", pa.int32()),
        ("name", pa.string()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
        ("data", pa.large_binary()),
        ("error", pa.string()),
        ("message", pa.string()),
    ]
)
"""A shard, with its bytes if the worker does not see the folder of the artifact.

It has no name if the worker does not see the file that it should read, or if there is an error.
"""

_LEAST_BYTES, _MOST_BYTES = 2**19, 16 * 2**20
"""Files of JSON lines are cut about every MiB. So a small file has a shard for each cut, and no
worker waits long for the last one.
"""
_SHARDS = 64


def shard_bytes(sources: Sequence[RawSource]) -> int:
    """How much of its sources a shard holds: enough shards for many cores, none of them tiny.

    It depends on the sources alone, so that any number of workers makes the same shards.
    """
    every = sum(raw.size for raw in sources)
    return min(max(every // _SHARDS, _LEAST_BYTES), _MOST_BYTES)


def parts_of(sources: Sequence[RawSource]) -> dict[Place, Part]:
    """The parts of all files that have parts, by the shards that they become."""
    size = shard_bytes(sources)
    return {
        (raw.number, piece): part
        for raw in sources
        if raw.cut is not None
        for piece, part in enumerate(raw.cut.parts(size))
    }


def tasks_of(
    sources: Sequence[RawSource], parts: Mapping[Place, Part], done: Container[Place]
) -> Iterator[pa.Table]:
    """TASK tables of the shards that are not done. Rows are read when their task is asked for."""
    size = shard_bytes(sources)
    for raw in sources:
        if raw.cut is None:
            for piece, rows in enumerate(_gathered(raw.blocks(), size)):
                if (raw.number, piece) not in done:
                    yield _with_piece(rows, piece)
    yield from (task_of(place) for place in parts if place not in done)


def task_of(place: Place) -> pa.Table:
    """The TASK of a part that the worker reads."""
    source, piece = place
    return pa.Table.from_pylist([{"source": source, "piece": piece}], schema=TASK)


def rows_of(place: Place, part: Part) -> pa.Table:
    """The TASK of a part whose rows this process reads, for a worker that does not see the file.

    A part may have no rows: blank lines alone. Raises DataError if the file has changed.
    """
    source, piece = place
    if not part.is_here():
        raise ChangedError(str(part.path))
    blocks = raw_blocks(part.rows(), source)
    return _with_piece(pa.concat_tables([RAW.empty_table(), *blocks]), piece)


def _gathered(blocks: Iterator[pa.Table], size: int) -> Iterator[pa.Table]:
    """Join blocks until they have `size` bytes of text."""
    joined: list[pa.Table] = []
    for block in blocks:
        joined.append(block)
        if sum(one["text"].nbytes for one in joined) >= size:
            yield pa.concat_tables(joined)
            joined = []
    if joined:
        yield pa.concat_tables(joined)


def _with_piece(rows: pa.Table, piece: int) -> pa.Table:
    return rows.append_column(TASK.field("piece"), pa.array([piece] * len(rows), pa.int32()))


class ShardMaker:
    """Processes the rows of a task and writes them as a shard; travels to workers once.

    `sign` is a path that exists only while the artifact is made. A worker that sees it sees the
    folder, too.
    """

    def __init__(
        self,
        processor: RowProcessor,
        *,
        parts: Mapping[Place, Part],
        folder: Path,
        sign: Path,
        kept_in: Storage,
    ) -> None:
        self._processor = processor
        self._parts = parts
        self._place = kept_in.place_of(folder.absolute())
        self._sign = sign.absolute()
        self._kept_in = kept_in

    def __call__(self, task: pa.Table) -> pa.Table:
        """A TASK to a MADE row.

        An error of ours is returned as a row, since Ray Data would wrap an exception.
        """
        place = task["source"][0].as_py(), task["piece"][0].as_py()
        try:
            return self._make(place, task)
        except OrpoRayError as error:
            nothing = Shard(source=place[0], piece=place[1], name="", size=0, sha256="")
            return _made(nothing, error=type(error).__name__, message=str(error))

    def _make(self, place: Place, task: pa.Table) -> pa.Table:
        blocks = self._blocks(place, task)
        if blocks is None:
            return _made(Shard(source=place[0], piece=place[1], name="", size=0, sha256=""))
        shard, data = pack(
            place, pa.concat_tables([RESULT.empty_table(), *map(self._processor, blocks)])
        )
        folder = local_path(self._place)
        if self._kept_in.is_remote:
            folder.mkdir(parents=True, exist_ok=True)
        elif not self._sign.exists():
            return _made(shard, data=data.to_pybytes())
        save(folder, shard, data)
        if self._sign.exists():
            self._sign.touch()  # what nobody touches for a day is deleted
        self._kept_in.store(folder / shard.name)
        return _made(shard)

    def _blocks(self, place: Place, task: pa.Table) -> Iterator[pa.Table] | None:
        """RAW blocks; None if the part that the task names cannot be read here.

        One block at a time is processed: the output of a tokenizer takes many times the memory of
        its text.
        """
        if task["text"][0].is_valid:
            batches = task.select(RAW.names).to_batches()
            return (pa.Table.from_batches([batch]) for batch in batches)
        part = self._parts[place]
        return raw_blocks(part.rows(), place[0]) if part.is_here() else None


def take(made: pa.Table) -> tuple[Shard, bytes | None]:
    """The shard of a MADE row, and its bytes if they came with it. Raises the worker's error."""
    row = made.to_pylist()[0]
    data, error, message = (row.pop(name) for name in ("data", "error", "message"))
    if error:
        raise getattr(errors, error)(message)
    return Shard(**row), data


def _made(shard: Shard, **more: Any) -> pa.Table:
    return pa.Table.from_pylist([asdict(shard) | more], schema=MADE)
