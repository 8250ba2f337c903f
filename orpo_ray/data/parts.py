"""Parts of local files: byte ranges of JSON lines, and row groups of Parquet.

A file is cut where its content says, not by the number of workers. So the same file has the same
parts everywhere, and any process that sees the file can read one.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Literal, NamedTuple

import pyarrow as pa

from orpo_ray.data.readers import (
    RawRow,
    explained,
    holds_lines,
    numbered_lines,
    open_parquet,
    read_parquet,
    read_row_groups,
)

_BLOCK_BYTES = 2**20
_SEGMENT_BLOCKS = 64
"""How many blocks one thread hashes at a time."""
_MOST_GROUP_BYTES = 64 * 2**20
"""A Parquet file with a larger row group is read from its start to its end by one process."""
_FIRST_ROWS = 20
_JSON = (".jsonl", ".ndjson", ".json")

Kind = Literal["lines", "row-groups"]
Stamp = tuple[int, int]
"""Size and time of change of a file: if they are the same, nobody has written to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The bytes or row groups from `start` up to `stop` of a file; `line` numbers its first row."""

    path: Path
    stamp: Stamp
    kind: Kind
    start: int
    stop: int
    line: int

    def is_here(self) -> bool:
        """Whether this server has the file, as it was when it was cut."""
        return _is_here(self.path, self.stamp)

    def rows(self) -> Iterator[RawRow]:
        """The rows of the part, in order. Raises DataError if they cannot be read."""
        return explained(str(self.path), self._rows())

    def _rows(self) -> Iterator[RawRow]:
        with self.path.open("rb") as stream:
            if self.kind == "lines":
                stream.seek(self.start)
                yield from numbered_lines(_lines(stream, self.stop - self.start), self.line)
            else:
                yield from read_row_groups(stream, self.start, self.stop, self.line)


class Cut(NamedTuple):
    """A place where a file can be cut: byte or row group, number of its row, bytes before it."""

    at: int
    line: int
    before: int


@dataclass(frozen=True, kw_only=True)
class CutFile:
    """A file whose parts can be read apart, and the hash of its content."""

    path: Path
    stamp: Stamp
    kind: Kind
    cuts: Sequence[Cut]
    digest: str

    @property
    def size(self) -> int:
        """Bytes of its rows."""
        return self.cuts[-1].before

    def is_here(self) -> bool:
        """Whether nobody has written to the file since it was cut."""
        return _is_here(self.path, self.stamp)

    def parts(self, part_bytes: int) -> Iterator[Part]:
        """Parts of `part_bytes` or somewhat more, in order."""
        start, last = self.cuts[0], self.cuts[-1]
        for cut in self.cuts[1:]:
            if cut.before - start.before >= part_bytes or (cut is last and cut.at > start.at):
                yield Part(
                    path=self.path,
                    stamp=self.stamp,
                    kind=self.kind,
                    start=start.at,
                    stop=cut.at,
                    line=start.line,
                )
                start = cut


def cut_file(path: Path) -> CutFile | None:
    """A file of JSON lines, or of Parquet with rows; None if it must be read from start to end.

    Files that are no such thing are None too: the code that reads them reports that.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in _JSON:
            return _cut_lines(path)
        return _cut_groups(path) if suffix == ".parquet" else None
    except (OSError, ValueError, pa.ArrowException):
        return None


def _cut_lines(path: Path) -> CutFile | None:
    stamp = _stamp(path)
    with path.open("rb") as stream:
        if not holds_lines(stream):
            return None
    digest, blocks = _scanned(path, stamp[0])
    cuts, line, read = [Cut(0, 1, 0)], 1, 0
    for block in blocks:
        line += block.lines
        if block.end:
            cuts.append(Cut(read + block.end, line, read + block.end))
        read += block.size
    if cuts[-1].at < read:
        cuts.append(Cut(read, line, read))
    return CutFile(path=path, stamp=stamp, kind="lines", cuts=cuts, digest=f"lines:{digest}")


def _cut_groups(path: Path) -> CutFile | None:
    stamp = _stamp(path)
    digest, _ = _scanned(path, stamp[0])
    with path.open("rb") as stream:
        metadata = open_parquet(stream).metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        first = [len(row.text) for row in islice(read_parquet(stream), _FIRST_ROWS)]
    if not first:
        return None
    # A column of few values takes little room in the file, and much once it is read.
    of_row = sum(first) / len(first)
    sizes = [max(group.total_byte_size, int(of_row * group.num_rows)) for group in groups]
    if max(sizes) > _MOST_GROUP_BYTES:
        return None
    cuts = [Cut(0, 1, 0)]
    for number, (group, size) in enumerate(zip(groups, sizes, strict=True), 1):
        last = cuts[-1]
        cuts.append(Cut(number, last.line + group.num_rows, last.before + size))
    return CutFile(path=path, stamp=stamp, kind="row-groups", cuts=cuts, digest=f"parquet:{digest}")


class _Block(NamedTuple):
    """Bytes of a file, line ends among them, and where in the block the last line ends, or 0."""

    size: int
    lines: int
    end: int


def _scanned(path: Path, size: int) -> tuple[str, list[_Block]]:
    """The hash of a file of `size` bytes, and its blocks; segments are read in parallel.

    The hash is that of the hashes of all segments, so that a large file has one soon.
    """
    with ThreadPoolExecutor() as threads:
        starts = range(0, size, _SEGMENT_BLOCKS * _BLOCK_BYTES)
        segments = list(threads.map(lambda start: _segment(path, start), starts))
    whole = hashlib.sha256(b"".join(digest for digest, _ in segments))
    return whole.hexdigest(), [block for _, blocks in segments for block in blocks]


def _segment(path: Path, start: int) -> tuple[bytes, list[_Block]]:
    """The hash of one segment and its blocks."""
    content, blocks = hashlib.sha256(), list[_Block]()
    with path.open("rb") as stream:
        stream.seek(start)
        for block in islice(iter(partial(stream.read, _BLOCK_BYTES), b""), _SEGMENT_BLOCKS):
            content.update(block)
            blocks.append(_Block(len(block), block.count(b"\n"), block.rfind(b"\n") + 1))
    return content.digest(), blocks


def _is_here(path: Path, stamp: Stamp) -> bool:
    try:
        return _stamp(path) == stamp
    except OSError:
        return False


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _lines(stream: IO[bytes], size: int) -> Iterator[bytes]:
    """The lines in the next `size` bytes."""
    read = 0
    while read < size and (line := stream.readline()):
        read += len(line)
        yield line
