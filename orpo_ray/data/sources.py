"""Raw rows of a source, each with its line; their content is not interpreted here."""

import codecs
import gzip
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from urllib.parse import urlsplit

import pyarrow as pa

from orpo_ray.config.data import Source
from orpo_ray.config.storage import expanded
from orpo_ray.data.hub import read_hub
from orpo_ray.data.places import PACKED, files_of, has_splits, is_pattern, not_read
from orpo_ray.data.readers import (
    RawRow,
    Reader,
    dump_row,
    explained,
    first_line,
    open_parquet,
    read_arrow,
    read_csv,
    read_json,
    read_parquet,
    read_tsv,
)
from orpo_ray.errors import DataError

_DOWNLOAD_BYTES = 2**20


def read_rows(source: Source) -> Iterator[RawRow]:
    """Rows of files, a URL or a hub dataset in order, at most `limit`.

    Raises DataError if the source cannot be read.
    """
    name = source.source
    if "://" in name:
        rows = _read_file(name, PurePosixPath(urlsplit(name).path).name)
    elif is_path(name):
        files = _files(source)
        rows = itertools.chain.from_iterable(_read_file(str(file), file.name) for file in files)
    else:
        rows = (RawRow(index, dump_row(row)) for index, row in read_hub(source))
    return itertools.islice(rows, source.limit)


def read_by_share(source: Source) -> Iterator[tuple[RawRow, float]]:
    """Rows of a local file, at most `limit`, each with the share of the file read by then.

    The share is of bytes. A reader may be a little ahead of its row, and that of Parquet jumps.
    """
    path = local_file(source)
    assert path is not None, "only a local file has a known size"
    opened: list[IO[bytes]] = []
    rows = _read_file(str(path), path.name, opened.append)
    size = path.stat().st_size
    for row in itertools.islice(rows, source.limit):
        yield row, opened[0].tell() / size


def stated_rows(path: Path) -> int | None:
    """How many rows a Parquet file says that it has; None for files that do not say it."""
    if path.suffix.lower() != ".parquet":
        return None
    with path.open("rb") as stream:
        return int(open_parquet(stream).metadata.num_rows)


def refuse_missing(source: Source) -> None:
    """Raise DataError for a file that does not exist or is given a split, without reading it."""
    name = source.source
    is_url = "://" in name
    if not (is_url or is_path(name)):
        return
    if source.split != "train" and (is_url or not has_splits(name)):
        raise DataError(f"{name}: split {source.split}: a file has no splits; leave split out")
    if source.config is not None:
        raise DataError(
            f"{name}: config {source.config}: only a hub dataset has configurations; leave config "
            "out"
        )
    if not is_url:
        _files(source)


def one_by_one(source: Source) -> list[Source]:
    """The source itself, or one source for each of its files if it has several."""
    if "://" in source.source or not is_path(source.source):
        return [source]
    files = _files(source)
    if files == [expanded(source.source, "source")]:
        return [source]
    return [source.model_copy(update={"source": str(f), "split": "train"}) for f in files]


def local_file(source: Source) -> Path | None:
    """The path of a source that is one local file, else None."""
    if "://" in source.source or not is_path(source.source):
        return None
    path = expanded(source.source, "source")
    return path if path.is_file() else None


def _files(source: Source) -> list[Path]:
    return files_of(source.source, source.split, _is_known)


def _is_known(name: str) -> bool:
    """Whether a file of this name is of a kind that can be read."""
    return _reader(name) is not None


def not_read_of(source: Source) -> list[str]:
    """The names in a source that is a folder, of which nothing is read."""
    if "://" in source.source or not is_path(source.source):
        return []
    return not_read(source.source, _is_known)


def source_labels(sources: Sequence[Source]) -> list[str]:
    """Short names for pair ids.

    A name is the file's name, with as many of its folders as it takes to tell the sources apart.
    """
    parts = [_label_parts(source, sources) for source in sources]
    labels = []
    for own in parts:
        others = [other for other in parts if other != own]
        depths = range(1, len(own) + 1)
        enough = (depth for depth in depths if _tells_apart(own, others, depth))
        labels.append("/".join(own[-next(enough, len(own)) :]))
    return labels


def _tells_apart(own: Sequence[str], others: Sequence[Sequence[str]], depth: int) -> bool:
    """Whether no other path has the same last `depth` parts."""
    return all(other[-depth:] != own[-depth:] for other in others)


def is_path(name: str) -> bool:
    """Whether a source names a local file.

    A file that exists comes before a hub dataset of the same name.
    """
    looks_like_one = (
        name.startswith(("/", "./", "../", "~"))
        or name.count("/") > 1
        or _reader(name) is not None
        or is_pattern(name)
    )
    return looks_like_one or Path(name).exists()


def _hub_label(source: Source, sources: Sequence[Source]) -> str:
    """The dataset's name.

    Configuration, revision and split are added if another source takes other rows of the same
    dataset.
    """
    same = (other for other in sources if other.source == source.source)
    if len({(other.config, other.revision, other.split) for other in same}) == 1:
        return source.source
    revision = f"@{source.revision}" if source.revision else ""
    config = f"/{source.config}" if source.config else ""
    return f"{source.source}{revision}{config}/{source.split}"


def _label_parts(source: Source, sources: Sequence[Source]) -> tuple[str, ...]:
    name = source.source
    if "://" in name:
        return PurePosixPath(urlsplit(name).path).parts
    if is_path(name):
        return expanded(name, "source").absolute().parts
    return (_hub_label(source, sources),)


def _read_file(
    location: str, name: str, on_open: Callable[[IO[bytes]], object] | None = None
) -> Iterator[RawRow]:
    reader = _reader(name)
    if reader is None:
        raise DataError(
            f"{location}: unknown kind of file; use .jsonl, .json, .csv, .tsv, .parquet or .arrow "
            "(text also as .gz or .zst)"
        )
    yield from explained(location, _rows_of(location, name, reader, on_open))


def _rows_of(
    location: str, name: str, reader: Reader, on_open: Callable[[IO[bytes]], object] | None
) -> Iterator[RawRow]:
    with _open(location) as stream:
        if on_open is not None:
            on_open(stream)
        yield from reader(_unzipped(stream, name))


@contextmanager
def _open(location: str) -> Iterator[IO[bytes]]:
    """Open a local or remote file; only remote ones need fsspec and its packages."""
    if "://" not in location:
        with Path(location).open("rb") as stream:
            yield stream
        return
    import fsspec

    try:
        opened = fsspec.open(location, "rb").open()
    except ImportError as error:
        raise DataError(f"{location}: a Python package is missing: {first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{location}: cannot be opened: {_why_closed(error, location)}") from error
    with opened as stream:
        yield io.BufferedReader(_Download(stream, location), _DOWNLOAD_BYTES)


def _why_closed(error: BaseException, location: str) -> str:
    """The status that a server answers with, or what the error says, or the error behind it."""
    behind = error.__cause__
    status, text = getattr(behind, "status", None), getattr(behind, "message", "")
    if status is not None:
        return f"the server answers {status} {text}".rstrip()
    said = first_line(error)
    return first_line(behind) if said == location and behind is not None else said


class _Download(io.RawIOBase):
    """A remote file whose errors name the way out; each kind of store has errors of its own."""

    def __init__(self, stream: Any, location: str) -> None:
        self._stream = stream
        self._location = location

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._stream.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except Exception as error:
            raise DataError(
                f"{self._location}: the download broke off; try again: {first_line(error)}"
            ) from error
        buffer[: len(data)] = data
        return len(data)


def _unzipped(stream: IO[bytes], name: str) -> IO[bytes]:
    opened: Any = stream
    if name.endswith(".gz"):
        opened = gzip.GzipFile(fileobj=stream)
    if name.endswith(".zst"):
        opened = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream), "zstd"))
    return _in_utf_8(opened) if _reader(name) in _TEXT_READERS else cast(IO[bytes], opened)


def _in_utf_8(stream: Any) -> IO[bytes]:
    """The stream itself. Raises ValueError if its first bytes are those of UTF-16."""
    peeked: IO[bytes] = stream if hasattr(stream, "peek") else io.BufferedReader(stream)
    if peeked.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # type: ignore[attr-defined]
        raise ValueError("the text is UTF-16; save it as UTF-8")
    return peeked


def _reader(name: str) -> Reader | None:
    path = PurePosixPath(name)
    packed = path.suffix.lower() in PACKED
    suffix = (PurePosixPath(path.stem) if packed else path).suffix.lower()
    reader = _READERS.get(suffix)
    return None if packed and reader not in _TEXT_READERS else reader


_READERS = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
_TEXT_READERS = (read_json, read_csv, read_tsv)
