"""Raw rows of a source, each with its line; their content is not interpreted here."""

import codecs
import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from orpo_ray.config.data import Source
from orpo_ray.config.storage import expanded
from orpo_ray.data.hub import read_hub
from orpo_ray.data.places import files_of, has_splits, is_pattern
from orpo_ray.errors import DataError

_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"
_PARQUET_ROWS = 256
_ARROW_FILE = b"ARROW1"


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as JSON text.

    `line` is the row's number if the file has no lines. `problem` is the code of a reason, if the
    reader found one.
    """

    line: int
    text: bytes
    problem: str = ""


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
        rows = (RawRow(index, _dump(row)) for index, row in read_hub(source))
    return itertools.islice(rows, source.limit)


def refuse_missing(source: Source) -> None:
    """Raise DataError for a file that does not exist or is given a split, without reading it."""
    name = source.source
    is_url = "://" in name
    if not (is_url or is_path(name)):
        return
    if source.split != "train" and (is_url or not has_splits(name)):
        raise DataError(f"{name}: split {source.split}: a file has no splits; leave split out")
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


def _files(source: Source) -> list[Path]:
    return files_of(source.source, source.split, lambda name: _reader(name) is not None)


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

    Split and revision are added if another source takes other rows of the same dataset.
    """
    rows = {(other.revision, other.split) for other in sources if other.source == source.source}
    revision = f"@{source.revision}" if source.revision else ""
    return source.source if len(rows) == 1 else f"{source.source}{revision}/{source.split}"


def _label_parts(source: Source, sources: Sequence[Source]) -> tuple[str, ...]:
    name = source.source
    if "://" in name:
        return PurePosixPath(urlsplit(name).path).parts
    if is_path(name):
        return expanded(name, "source").absolute().parts
    return (_hub_label(source, sources),)


def _read_file(location: str, name: str) -> Iterator[RawRow]:
    reader = _reader(name)
    if reader is None:
        raise DataError(
            f"{location}: unknown kind of file; use .jsonl, .json, .csv, .tsv, .parquet or .arrow "
            "(text also as .gz or .zst)"
        )
    line = 0
    try:
        with _open(location) as stream:
            for row in reader(_unzipped(stream, name)):
                line = row.line
                yield row
    except DataError:
        raise
    except (
        EOFError,
        gzip.BadGzipFile,
        zlib.error,
        csv.Error,
        pa.ArrowException,
        OSError,
        ValueError,
    ) as error:
        kinds = (text for types, text in _FAILURES.items() if isinstance(error, types))
        kind = next(kinds, "cannot be read")
        after = f" after line {line}" if line else ""
        raise DataError(f"{location}: {kind}{after}: {_first_line(error)}") from error


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
        raise DataError(f"{location}: a Python package is missing: {_first_line(error)}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{location}: cannot be opened: {_first_line(error)}") from error
    with opened as stream:
        yield stream


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


def _reader(name: str) -> Callable[[IO[bytes]], Iterator[RawRow]] | None:
    path = PurePosixPath(name)
    packed = path.suffix.lower() in _PACKED
    suffix = (PurePosixPath(path.stem) if packed else path).suffix.lower()
    reader = _READERS.get(suffix)
    return None if packed and reader not in _TEXT_READERS else reader


# --- JSON -----------------------------------------------------------------------------------------


def _read_json(stream: IO[bytes]) -> Iterator[RawRow]:
    """Read JSON lines or one array.

    The content decides, not the suffix: many .json files hold lines, and some .jsonl files
    hold an array.
    """
    first, number = stream.readline().removeprefix(_BOM), 1
    while first and not first.strip():
        first, number = stream.readline(), number + 1
    opening = first.lstrip()[:1]
    if opening == b"[" or (opening == b"{" and not _is_json(first)):
        rest = stream.read()
        if _is_array(first, rest) or _is_json(first + rest):
            yield from _elements(first + rest)
            return
        stream = io.BytesIO(rest)
    second = stream.readline()
    if opening == b"{" and not second:
        yield from _elements(first)
        return
    yield from _lines(itertools.chain([first, second] if first else [], stream), number)


def _is_array(first: bytes, rest: bytes) -> bool:
    """Whether the whole file is one array.

    If the first line is a complete list and more lines follow, it is not.
    """
    return first.lstrip().startswith(b"[") and (not rest.strip() or not _is_json(first))


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(lines: Iterable[bytes], number: int) -> Iterator[RawRow]:
    """Rows that end with a line feed. Other line ends, such as U+2028, may be inside a text."""
    for line, text in enumerate(lines, number):
        if text.strip():
            yield RawRow(line, text.strip())


def _elements(data: bytes) -> Iterator[RawRow]:
    """Elements of an array, or a single value, numbered from 1 and with their text unchanged."""
    # surrogateescape: a wrong byte makes only its own row bad, and encoding gives the byte back.
    text = data.decode("utf-8", errors="surrogateescape").strip()
    if not text.startswith("["):
        rows = _columns_as_rows(text)
        if rows is None:
            yield RawRow(1, text.encode("utf-8", errors="surrogateescape"))
            return
        yield from (RawRow(number, _dump(row)) for number, row in enumerate(rows, 1))
        return
    decoder, number = json.JSONDecoder(), 0
    position = _skip(text, 1, _SPACE)
    while position < len(text) and text[position] != "]":
        number += 1
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"element {number} is not valid JSON: {error}") from error
        yield RawRow(number, text[position:end].encode("utf-8", errors="surrogateescape"))
        position = _skip(text, end, _SPACE)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1, _SPACE)
        elif text[position : position + 1] != "]":
            raise ValueError(f"there is no comma and no closing bracket after element {number}")
    if text[position:] != "]":
        raise ValueError(f"the array does not end after element {number}")


def _columns_as_rows(text: str) -> list[dict[str, Any]] | None:
    """The rows of one object that holds whole columns, or None for any other value.

    pandas writes a column as an object by row number, and other programs as a list of texts.
    """
    found = json.loads(text)
    columns = list(found.values()) if isinstance(found, dict) else []
    if columns and all(isinstance(c, dict) and c and all(map(str.isdigit, c)) for c in columns):
        keys = list(columns[0])
        return [{name: found[name].get(key) for name in found} for key in keys]
    texts = all(isinstance(c, list) and all(isinstance(v, str) for v in c) for c in columns)
    if len(columns) > 1 and texts and len({len(c) for c in columns}) == 1:
        return [dict(zip(found, values, strict=True)) for values in zip(*columns, strict=True)]
    return None


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


# --- CSV and Parquet ------------------------------------------------------------------------------


def _read_tsv(stream: IO[bytes]) -> Iterator[RawRow]:
    return _read_csv(stream, delimiter="\t")


def _read_csv(stream: IO[bytes], delimiter: str = ",") -> Iterator[RawRow]:
    """Rows of a CSV file with a header.

    strict=True: otherwise a quote that is never closed would hide the rest of the file.
    """
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    records = csv.reader(text, strict=True, delimiter=delimiter)
    header = next(records, [])
    if not all(map(_is_utf_8, header)):
        raise ValueError("the header is not UTF-8; save the file as UTF-8")
    if len(set(header)) < len(header):
        raise csv.Error("the header names a column twice")
    line = records.line_num + 1
    for record in records:
        if record:
            problem = "" if len(record) == len(header) else "ragged-row"
            if not all(map(_is_utf_8, record)):
                problem = "invalid-utf8"
            yield RawRow(line, _dump(dict(zip(header, record, strict=False))), problem)
        line = records.line_num + 1


def _is_utf_8(text: str) -> bool:
    """Whether no byte of a text had to be escaped when it was read."""
    return text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text)


def _read_arrow(stream: IO[bytes]) -> Iterator[RawRow]:
    """Rows of Arrow's file format or of its stream, as `save_to_disk` of datasets writes it."""
    magic = stream.read(len(_ARROW_FILE))
    stream.seek(0)
    if magic == _ARROW_FILE:
        file = pa.ipc.open_file(stream)
        batches: Iterable[pa.RecordBatch] = (
            file.get_batch(number) for number in range(file.num_record_batches)
        )
    else:
        batches = pa.ipc.open_stream(stream)
    yield from _numbered(batches)


def _read_parquet(stream: IO[bytes]) -> Iterator[RawRow]:
    file = pq.ParquetFile(stream)
    names = file.schema_arrow.names
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"there are two columns of the name {twice}")
    yield from _numbered(file.iter_batches(batch_size=_PARQUET_ROWS))


def _numbered(batches: Iterable[pa.RecordBatch]) -> Iterator[RawRow]:
    """The rows of a table, numbered from 1."""
    rows = (row for batch in batches for row in batch.to_pylist())
    return (RawRow(number, _dump(row)) for number, row in enumerate(rows, 1))


def _dump(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=True, default=_plain).encode()


def _plain(value: Any) -> Any:
    """A text that was kept as bytes. Images and dates become the name of their type.

    No recognised column may hold these.
    """
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return {"type": "bytes"}
    return {"type": type(value).__name__}


def _first_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).splitlines()[0]


_FAILURES: dict[tuple[type[Exception], ...], str] = {
    (EOFError, gzip.BadGzipFile, zlib.error): "the gzip data is damaged",
    (csv.Error,): "not valid CSV",
    (pa.ArrowException,): "not a readable file",
}
_READERS = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}
_TEXT_READERS = (_read_json, _read_csv, _read_tsv)
_PACKED = (".gz", ".zst")
