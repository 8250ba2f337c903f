"""Shards of an artifact: the processed rows of one part of a source, in one Arrow file.

A shard's name holds its place and the beginning of its SHA-256. So a preparation that was killed
goes on with the shards that it finds whole. The same rows give the same bytes, whichever process
writes them.
"""

import hashlib
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from orpo_ray.errors import DataError

BATCH_ROWS = 8192
Place = tuple[int, int]
"""Where a shard stands among the others: number of its source, and of its piece of the source."""

WRITING = ".writing-"
"""A file whose name begins like this is not complete."""
_NAME = re.compile(r"pairs-(\d{5,})-(\d{5,})-([0-9a-f]{16})\.arrow")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of an artifact."""

    source: int
    piece: int
    name: str
    size: int
    sha256: str

    @property
    def place(self) -> Place:
        """Shards in the order of their places have all rows in the order of the sources."""
        return self.source, self.piece


def pack(place: Place, rows: pa.Table) -> tuple[Shard, pa.Buffer]:
    """A shard of processed rows and the bytes of its file."""
    source, piece = place
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, rows.schema) as writer:
        for batch in rows.combine_chunks().to_batches(BATCH_ROWS):
            writer.write_batch(batch)
    data = sink.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    name = f"pairs-{source:05}-{piece:05}-{digest[:16]}.arrow"
    return Shard(source=source, piece=piece, name=name, size=data.size, sha256=digest), data


def save(folder: Path, shard: Shard, data: pa.Buffer | bytes) -> None:
    """Write a shard's file beside its place, then rename it in one step.

    Raises DataError if it cannot be written.
    """
    building = folder / f"{WRITING}{uuid.uuid4().hex[:8]}"
    try:
        building.write_bytes(data)
        building.replace(folder / shard.name)
    except OSError as error:
        raise DataError(
            f"cannot write the prepared data to {folder}: {error.strerror or error}"
        ) from error
    finally:
        building.unlink(missing_ok=True)


def whole_shards(folder: Path) -> dict[Place, Shard]:
    """The shards of a folder by place; damaged ones are deleted."""
    found: dict[Place, Shard] = {}
    for path in sorted(folder.iterdir()):
        named = _NAME.fullmatch(path.name)
        if named is None:
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(named[3]):
            path.unlink()
            continue
        source, piece = int(named[1]), int(named[2])
        size = path.stat().st_size
        found[source, piece] = Shard(
            source=source, piece=piece, name=path.name, size=size, sha256=digest
        )
    return found


def copy_from(path: Path, choose: Callable[[pa.Table], pa.Table]) -> pa.Table:
    """What `choose` makes of a shard's table, copied out of the file.

    The file is memory-mapped meanwhile, so that only the chosen columns are read.
    """
    with pa.memory_map(str(path)) as file:
        chosen = choose(pa.ipc.open_file(file).read_all())
        return chosen.take(pa.array(range(len(chosen)), pa.int64()))
