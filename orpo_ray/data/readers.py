"""Bytes of a file in, raw rows with their lines out: JSON, CSV, Parquet and Arrow.

The content of a row is not interpreted here. Only a part of a file is in memory at a time.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from orpo_ray.data.plain import plain_rows
from orpo_ray.errors import DataError

_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"
_WINDOW_BYTES = 2**20
_LONGEST_WORD = 16
_DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "vertical bar"}
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


Reader = Callable[[IO[bytes]], Iterator[RawRow]]


def explained(location: str, rows: Iterable[RawRow]) -> Iterator[RawRow]:
    """The rows of a reader, whose errors become one DataError with the place and the last line."""
    line = 0
    try:
        for row in rows:
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
        raise DataError(f"{location}: {kind}{after}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).splitlines()[0]


_FAILURES: dict[tuple[type[Exception], ...], str] = {
    (EOFError, gzip.BadGzipFile, zlib.error): "the gzip data is damaged",
    (csv.Error,): "not valid CSV",
    (pa.ArrowException,): "not a readable file",
}


# --- JSON -----------------------------------------------------------------------------------------


def read_json(stream: IO[bytes]) -> Iterator[RawRow]:
    """Read JSON lines, one array, or one object that holds whole columns.

    The content decides, not the suffix: many .json files hold lines, and some .jsonl files
    hold an array.
    """
    number, head = _first_lines(stream)
    opening = head[0].lstrip()[:1] if head else b""
    alone = not any(line.strip() for line in head[1:])
    if opening == b"[" and (alone or not _is_json(head[0])):
        yield from _elements(b"".join(head), stream)
        return
    if opening == b"{" and alone and _is_json(head[0]):
        yield from _single(head[0])
        return
    if opening == b"{" and not (_is_json(head[0]) or _is_json(head[-1])):
        whole = b"".join(head) + stream.read()
        if _is_json(whole):
            yield from _single(whole)
            return
        head, stream = [], io.BytesIO(whole)
    yield from numbered_lines(itertools.chain(head, stream), number)


def holds_lines(stream: IO[bytes]) -> bool:
    """Whether a file is JSON lines, as `read_json` decides it: its rows can be read apart."""
    _, head = _first_lines(stream)
    several = any(line.strip() for line in head[1:])
    return several and head[0].lstrip()[:1] == b"{" and _is_json(head[0])


def numbered_lines(lines: Iterable[bytes], number: int) -> Iterator[RawRow]:
    """Rows that end with a line feed. Other line ends, such as U+2028, may be inside a text."""
    for line, text in enumerate(lines, number):
        row = (text.removeprefix(_BOM) if line == 1 else text).strip()
        if row:
            yield RawRow(line, row)


def _first_lines(stream: IO[bytes]) -> tuple[int, list[bytes]]:
    """The number of the first line with text, and the lines from it to the next one with text.

    Of a long array in one line, only its beginning is read.
    """
    number = 1
    first = stream.readline(_WINDOW_BYTES).removeprefix(_BOM)
    while first and not first.strip():
        first, number = stream.readline(_WINDOW_BYTES), number + 1
    if not first:
        return number, []
    if not first.endswith(b"\n"):
        if first.lstrip().startswith(b"["):
            return number, [first]
        first += stream.readline()
    head = [first]
    while line := stream.readline():
        head.append(line)
        if line.strip():
            break
    return number, head


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _single(text: bytes) -> Iterator[RawRow]:
    """The row of one value, or the rows of one object that holds whole columns."""
    rows = _columns_as_rows(json.loads(text))
    if rows is None:
        yield RawRow(1, text.strip())
        return
    yield from (RawRow(number, dump_row(row)) for number, row in enumerate(rows, 1))


def _columns_as_rows(found: Any) -> list[dict[str, Any]] | None:
    """The rows of one object that holds whole columns, or None for any other value.

    pandas writes a column as an object by row number, and other programs as a list of texts.
    """
    columns = list(found.values()) if isinstance(found, dict) else []
    if columns and all(isinstance(c, dict) and c and all(map(str.isdigit, c)) for c in columns):
        keys = list(columns[0])
        return [{name: found[name].get(key) for name in found} for key in keys]
    texts = all(isinstance(c, list) and all(isinstance(v, str) for v in c) for c in columns)
    if len(columns) > 1 and texts and len({len(c) for c in columns}) == 1:
        return [dict(zip(found, values, strict=True)) for values in zip(*columns, strict=True)]
    return None


def _elements(head: bytes, stream: IO[bytes]) -> Iterator[RawRow]:
    """Elements of an array, numbered from 1 and with their text unchanged."""
    window = _Window(head, stream)
    window.step()  # over the opening bracket
    number = 0
    while window.next_sign() not in ("]", ""):
        number += 1
        try:
            text = window.take_value()
        except json.JSONDecodeError as error:
            raise ValueError(f"element {number} is not valid JSON: {error.msg}") from error
        except RecursionError as error:
            raise ValueError(f"element {number} is not valid JSON: {error}") from error
        yield RawRow(number, text.encode("utf-8", errors="surrogateescape"))
        sign = window.next_sign()
        if sign == ",":
            window.step()
        elif sign != "]":
            raise ValueError(f"there is no comma and no closing bracket after element {number}")
    if window.next_sign() == "]":
        window.step()
        if not window.next_sign():
            return
    raise ValueError(f"the array does not end after element {number}")


class _Window:
    """The part of a text that is being parsed; it reads on as far as it must."""

    def __init__(self, head: bytes, stream: IO[bytes]) -> None:
        # surrogateescape: a wrong byte makes only its own row bad, and encoding gives it back.
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._decoder = json.JSONDecoder()
        self._stream = stream
        self._text = self._decode(head)
        self._position = 0
        self._ended = False

    def next_sign(self) -> str:
        """The next character that is no space, without taking it; "" at the end."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in _SPACE:
                self._position += 1
            if self._position < len(self._text) or self._ended:
                return self._text[self._position : self._position + 1]
            self._grow()

    def step(self) -> None:
        """Take the character that `next_sign` gives."""
        self.next_sign()
        self._position += 1

    def take_value(self) -> str:
        """Take the text of one JSON value. Raises ValueError if there is none."""
        while True:
            try:
                _, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or self._is_at_end(error.pos)
                if self._ended or not is_cut:
                    raise
            else:
                # A number that touches the end of the window may go on after it.
                if end < len(self._text) or self._ended:
                    text, self._position = self._text[self._position : end], end
                    return text
            self._grow()

    def _is_at_end(self, position: int) -> bool:
        """Whether a word or number of JSON at this position may go on after the window."""
        return position > len(self._text) - _LONGEST_WORD

    def _grow(self) -> None:
        """Read as much again as is left, so that a long value is parsed only a few times."""
        left = self._text[self._position :]
        more = self._stream.read(max(_WINDOW_BYTES, len(left)))
        self._ended = not more
        self._text, self._position = left + self._decode(more, final=not more), 0


# --- CSV and Parquet ------------------------------------------------------------------------------


def read_tsv(stream: IO[bytes]) -> Iterator[RawRow]:
    """Rows of a table with tabs and a header."""
    return read_csv(stream, delimiter="\t")


def read_csv(stream: IO[bytes], delimiter: str = ",") -> Iterator[RawRow]:
    """Rows of a CSV file with a header.

    strict=True: otherwise a quote that is never closed would hide the rest of the file.
    """
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    records = csv.reader(text, strict=True, delimiter=delimiter)
    written = next(records, [])
    header = _column_names(written, delimiter)
    first = records.line_num + 1
    if any(name.startswith(" ") for name in written):
        records = csv.reader(text, strict=True, delimiter=delimiter, skipinitialspace=True)
    for line, record in _with_lines(records, first, delimiter):
        if record:
            problem = "" if len(record) == len(header) else "ragged-row"
            if not all(map(_is_utf_8, record)):
                problem = "invalid-utf8"
            yield RawRow(line, dump_row(dict(zip(header, record, strict=False))), problem)


def _column_names(written: list[str], delimiter: str) -> list[str]:
    """The names in a header, without the blanks around them.

    Raises ValueError for a header that is not UTF-8, and csv.Error for one of a wrong form.
    """
    if not all(map(_is_utf_8, written)):
        raise ValueError("the header is not UTF-8; save the file as UTF-8")
    names = [name.strip().removeprefix('"').removesuffix('"') for name in written]
    if len(set(names)) < len(names):
        raise csv.Error("the header names a column twice")
    others = {sign: name for sign, name in _DELIMITERS.items() if sign != delimiter}
    found = next((name for sign, name in others.items() if sign in "".join(written)), None)
    if len(names) == 1 and found:
        raise csv.Error(
            f"line 1: the header has {found}s and no {_DELIMITERS[delimiter]}; save the table with "
            "commas as .csv, or with tabs as .tsv"
        )
    return names


def _with_lines(records: Any, first: int, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a `csv.reader` that stands at the line `first`, with their lines."""
    line, lines_before = first, first - 1 - records.line_num
    try:
        for record in records:
            yield line, record
            line = lines_before + records.line_num + 1
    except csv.Error as error:
        said = str(error)
        if "expected after" in said:
            said = (
                f"a closing quote is not followed by a {_DELIMITERS[delimiter]}; put the cell in "
                'quotes and write each quote inside of it twice ("")'
            )
        raise csv.Error(f"the row of line {line}: {said}") from error


def _is_utf_8(text: str) -> bool:
    """Whether no byte of a text had to be escaped when it was read."""
    return text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text)


def read_arrow(stream: IO[bytes]) -> Iterator[RawRow]:
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


def read_parquet(stream: IO[bytes]) -> Iterator[RawRow]:
    """Rows of a Parquet file."""
    file = open_parquet(stream)
    yield from _numbered(file.iter_batches(batch_size=_PARQUET_ROWS))


def read_row_groups(stream: IO[bytes], first: int, last: int, number: int) -> Iterator[RawRow]:
    """Rows of the row groups `first` up to `last`, which is not read; `number` is the first's."""
    file = open_parquet(stream)
    groups = list(range(first, last))
    yield from _numbered(file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=groups), number)


def open_parquet(stream: IO[bytes]) -> pq.ParquetFile:
    """A Parquet file, read piece by piece. Raises ValueError if two columns have one name."""
    file = pq.ParquetFile(stream, buffer_size=_WINDOW_BYTES)
    names = file.schema_arrow.names
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"there are two columns of the name {twice}")
    return file


def _numbered(batches: Iterable[pa.RecordBatch], number: int = 1) -> Iterator[RawRow]:
    """The rows of a table, numbered from `number`."""
    rows = enumerate(plain_rows(batches), number)
    return (RawRow(line, dump_row(row)) for line, row in rows)


def dump_row(row: dict[str, Any]) -> bytes:
    """A row of plain values as JSON text."""
    return json.dumps(row, ensure_ascii=True).encode()
