"""Reading rows: every kind of file, line numbers, and one clear line for each kind of damage."""

import gzip
import json
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, timedelta
from decimal import Decimal
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from orpo_ray.config.data import DataConfig, Source
from orpo_ray.data.formats import Reading, read_pairs
from orpo_ray.data.hub import explain_hub_error
from orpo_ray.data.pairs import Refusal
from orpo_ray.data.raw import announce_not_read, read_all
from orpo_ray.data.readers import RawRow
from orpo_ray.data.rows import parse_row
from orpo_ray.data.sources import read_rows, refuse_missing, source_labels
from orpo_ray.errors import ConfigError, DataError

ROW = {"prompt": "Q", "chosen": "good", "rejected": "bad"}


def read(path: Path | str, **settings: Any) -> list[RawRow]:
    return list(read_rows(Source(source=str(path), **settings)))


def values(path: Path) -> list[tuple[int, Any]]:
    return [(row.line, parse_row(row.text, row.problem)) for row in read(path)]


def refused(path: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({**ROW, "n": n}) + "\n" for n in range(5)))
    return path


def test_json_lines_with_their_numbers(lines: Path) -> None:
    assert values(lines) == [(n + 1, {**ROW, "n": n}) for n in range(5)]


def test_limit_counts_from_the_start(lines: Path) -> None:
    assert [row.line for row in read(lines, limit=2)] == [1, 2]


def test_blank_lines_are_skipped_and_still_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"a":1}\r\n  \r\n\n{"a":2}')
    assert values(path) == [(2, {"a": 1}), (5, {"a": 2})]


def test_unicode_line_separators_do_not_split_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = "one\u2028two\u2029three\x85four\x0bfive"
    path.write_text(json.dumps({"a": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert values(path) == [(1, {"a": text})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path, name: str) -> None:
    body = "a\n1\n" if name.endswith("csv") else '{"a": "1"}\n'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + body.encode())
    assert [value for _, value in values(tmp_path / name)] == [{"a": "1"}]


def test_gzip_and_huge_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    big = {"a": "x" * 5_000_000}
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(big) + "\n" + json.dumps(ROW) + "\n")
    assert values(path) == [(1, big), (2, ROW)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("indent", [None, 4])
def test_an_array_is_read_by_element(tmp_path: Path, name: str, indent: int | None) -> None:
    (tmp_path / name).write_text(
        "\n" + json.dumps([ROW, {"a": [1, {"b": "],["}]}], indent=indent) + "\n"
    )
    assert values(tmp_path / name) == [(1, ROW), (2, {"a": [1, {"b": "],["}]})]


def test_lines_in_a_json_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}\n{"a": 2}\n')
    assert values(tmp_path / "a.json") == [(1, {"a": 1}), (2, {"a": 2})]


def test_a_single_object_over_several_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROW, indent=2))
    assert values(tmp_path / "a.json") == [(1, ROW)]


def test_a_list_on_the_first_line_does_not_make_lines_an_array(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('["a"]\n{"a": 2}\n')
    (_, first), second = values(tmp_path / "a.jsonl")
    assert first.code == "not-an-object"
    assert second == (2, {"a": 2})


def test_parquet_rows(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["Q", None],
            "chosen": [[{"role": "assistant", "content": "a"}], None],
            "b": [b"\xff\xd8", None],
            "kept as bytes": ["é".encode(), None],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == [
        (
            1,
            {
                "prompt": "Q",
                "chosen": [{"role": "assistant", "content": "a"}],
                "b": {"type": "bytes"},
                "kept as bytes": "é",
            },
        ),
        (2, {"prompt": None, "chosen": None, "b": None, "kept as bytes": None}),
    ]


def calls(*arguments: Any) -> list[dict[str, Any]]:
    """The turns of an assistant that calls a tool once for each of the arguments."""
    functions = [{"name": "f", "arguments": each} for each in arguments]
    return [{"role": "assistant", "tool_calls": [{"function": each}]} for each in functions]


def test_a_null_in_a_struct_is_no_field_at_any_depth(tmp_path: Path) -> None:
    """Arrow gives all structs of a column the fields of each of them."""
    rows = [
        {"chosen": calls({"expr": "1+1"}, {"at": {"x": 1}}), "note": None},
        {"chosen": calls({"city": "Paris", "days": [1, None]}), "note": "kept"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    pa.feather.write_feather(pa.Table.from_pylist(rows), tmp_path / "a.arrow")
    for name in ("a.parquet", "a.arrow"):
        assert [row for _, row in values(tmp_path / name)] == rows


def test_a_null_in_a_struct_of_a_hub_dataset_is_no_field(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"chosen": calls({"expr": "1+1"})}, {"chosen": calls({"city": "Paris"})}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    assert [json.loads(row.text) for row in read("org/set")] == rows


@pytest.mark.parametrize(
    ("values_of", "kind", "expected"),
    [
        ([date(2024, 1, 31)], pa.date32(), "2024-01-31"),
        ([datetime(2024, 1, 31, 12, 5)], pa.timestamp("ms"), "2024-01-31T12:05:00"),
        ([Decimal("1.50")], pa.decimal128(5, 2), 1.5),
        ([Decimal("3.00")], pa.decimal128(5, 2), 3),
        (
            [[("when", "now"), ("n", "1")]],
            pa.map_(pa.string(), pa.string()),
            {"when": "now", "n": "1"},
        ),
        ([[]], pa.map_(pa.string(), pa.string()), {}),
        ([[(7, 1.5)]], pa.map_(pa.int32(), pa.float32()), {"7": 1.5}),
        (["a"], pa.dictionary(pa.int8(), pa.string()), "a"),
    ],
    ids=str,
)
def test_what_json_has_no_type_for_is_written_plainly(
    tmp_path: Path, values_of: list[Any], kind: pa.DataType, expected: Any
) -> None:
    column = pa.array(values_of, kind)
    inside = pa.StructArray.from_arrays([column], names=["x"])
    pq.write_table(pa.table({"own": column, "struct": inside}), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == [(1, {"own": expected, "struct": {"x": expected}})]


def test_what_json_cannot_hold_makes_no_pair(tmp_path: Path) -> None:
    lasting = calls({"for": timedelta(days=1)})
    row = {"prompt": "Q", "chosen": lasting, "rejected": "no", "tools": [{"logo": b"\xff"}]}
    pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / "a.parquet")
    (_, found), _ = values(tmp_path / "a.parquet")
    assert found == row | {"chosen": {"type": "timedelta"}, "tools": {"type": "bytes"}}
    for without in ("tools", "chosen"):
        refusal = read_pairs(found | {without: "yes" * (without == "chosen")}, Reading())
        assert isinstance(refusal, Refusal) and refusal.code == "wrong-type"


def test_a_map_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    twice = pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int32()))
    pq.write_table(pa.table({"prompt": twice}), tmp_path / "a.parquet")
    assert "a map has a key twice" in refused(tmp_path / "a.parquet")


def test_csv_cells_over_several_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'prompt,chosen\r\n"one\r\ntwo","say ""hi"""\r\n\r\nx,y\r\n')
    assert values(tmp_path / "a.csv") == [
        (2, {"prompt": "one\r\ntwo", "chosen": 'say "hi"'}),
        (5, {"prompt": "x", "chosen": "y"}),
    ]


def test_csv_row_with_a_cell_too_many(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2,3\n1,2\n")
    assert [row.problem for row in read(tmp_path / "a.csv")] == ["ragged-row", ""]


def test_real_csv_has_its_31_rows(shared_data: Path) -> None:
    rows = values(shared_data / "formats/rwkv_dpo_withreject.csv")
    assert len(rows) == 31
    assert all(set(row) == {"prompt", "chosen", "reject"} for _, row in rows)
    assert sum("\r\n" in cell or "\n" in cell for _, row in rows for cell in row.values()) > 0


def test_real_blank_lines_leave_242_rows(shared_data: Path) -> None:
    assert len(read(shared_data / "mxandre_dpo_train_zh.jsonl")) == 242


# --- broken rows: the row is bad, and the rest of the file is read --------------------------------


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"a": "\xff"}', "invalid-utf8"),
        (b"[1, 2]", "not-an-object"),
        (b'"text"', "not-an-object"),
        (b"null", "not-an-object"),
        (b'{"a": 1', "not-json"),
        (b"{'a': 1}", "not-json"),
        (b'{"a": 1} {"a": 2}', "not-json"),
        (b'{"a": "tab\there"}', "not-json"),
        (b'{"a": 1, "a": 2}', "duplicate-key"),
        (b'{"a": {"b": 1, "b": 2}}', "duplicate-key"),
        (b"[" * 200_000, "not-json"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not-json"),
    ],
)
def test_a_broken_row_does_not_stop_the_file(tmp_path: Path, line: bytes, code: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    found = values(path)
    assert found[0] == (1, {"a": 1})
    assert (found[1][0], found[1][1].code) == (2, code)
    assert found[2] == (3, {"a": 3})


def test_a_wrong_byte_in_an_array_condemns_its_own_element(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"a": "\xff"}, {"a": "\xc3\xa9"}]')
    (_, first), second = values(tmp_path / "a.json")
    assert first.code == "invalid-utf8"
    assert second == (2, {"a": "é"})


def test_a_wrong_byte_in_a_csv_is_seen_by_the_row_check(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a\n\xff\nok\n")
    bad = Refusal("invalid-utf8", "save the file as UTF-8")
    assert values(tmp_path / "a.csv") == [(2, bad), (3, {"a": "ok"})]
    (tmp_path / "b.csv").write_bytes("fran\xe7ais\nx\n".encode("latin-1"))
    assert "the header is not UTF-8; save the file as UTF-8" in refused(tmp_path / "b.csv")


# --- broken files: one line that says what and where ----------------------------------------------


def test_truncated_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 2000)[:-30])
    assert "gzip data is damaged" in refused(path)


def test_gzip_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_text("plain")
    assert "gzip data is damaged" in refused(tmp_path / "a.jsonl.gz")


def test_the_files_of_a_folder_or_pattern_are_read_in_the_order_of_their_names(
    tmp_path: Path, lines: Path
) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps({"n": 5}) + "\n")
    (tmp_path / "notes.md").write_text("no rows")
    for place in (tmp_path, tmp_path / "*.jsonl", tmp_path / "**" / "?.jsonl"):
        assert [json.loads(row.text)["n"] for row in read(place)] == [0, 1, 2, 3, 4, 5]
    assert [json.loads(row.text)["n"] for row in read(tmp_path, limit=2)] == [0, 1]
    data = DataConfig(train=[Source(source=str(tmp_path), limit=6), Source(source=str(lines))])
    raws = read_all(data)
    assert [raw.label for raw in raws] == ["a.jsonl", "b.jsonl", "a.jsonl"]
    assert [raw.rows for raw in raws] == [5, 1, None]
    assert [len(raw.first) for raw in raws] == [5, 1, 5]
    (tmp_path / "c.csv").write_text("a\n1\n")
    assert "has files of several kinds; name some with a pattern, such as" in refused(tmp_path)
    assert refused(tmp_path / "*.parquet").endswith("*.parquet: no file matches this pattern")
    (tmp_path / "empty").mkdir()
    assert "there is no file with rows in this directory" in refused(tmp_path / "empty")


def test_datasets_saved_to_disk_are_read(tmp_path: Path) -> None:
    rows = [{**ROW, "n": n} for n in range(3)]
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    assert [json.loads(row.text) for row in read(tmp_path / "one")] == rows
    datasets.DatasetDict({"train": saved, "test": saved.select([2])}).save_to_disk(tmp_path / "two")
    assert [json.loads(row.text) for row in read(tmp_path / "two")] == rows
    assert [json.loads(row.text) for row in read(tmp_path / "two", split="test")] == rows[2:]
    refuse_missing(Source(source=str(tmp_path / "two"), split="test"))
    with pytest.raises(DataError, match="split dev: it has train, test"):
        read(tmp_path / "two", split="dev")


def folder_of(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_what_a_folder_has_beside_its_rows_is_announced(tmp_path: Path) -> None:
    row = json.dumps(ROW)
    folder = folder_of(
        tmp_path / "a", p__v1__jsonl=row, p__v2__jsonl=row, p__jsonl__xz="", b__md=""
    )
    (folder / "._p.v1.jsonl").write_bytes(b"\0\5\x16\7")
    (folder / "sub").mkdir()
    assert len(read(folder)) == 2
    said: list[str] = []
    whole, one = Source(source=str(folder)), Source(source=str(folder / "p.v1.jsonl"))
    pattern = Source(source=f"{folder}/*.jsonl")
    announce_not_read(DataConfig(train=[whole, one, pattern], eval=[whole]), said.append)
    assert said == [f"{folder}: not read: b.md, p.jsonl.xz, sub/"]


def test_a_state_of_another_program_makes_no_saved_dataset(tmp_path: Path) -> None:
    rows = json.dumps(ROW)
    for name, state in {"a": '{"step": 3}', "b": "[1]"}.items():
        folder = folder_of(tmp_path / name, pairs__jsonl=rows, state__json=state)
        assert f"files of several kinds; name some with a pattern, such as {folder}/*.jsonl" in (
            refused(folder)
        )


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("state.json", '{"_data_files": 1}', "state.json: it has no list of _data_files"),
        ("state.json", '{"_data_files": [{}]}', "_data_files names no files; save the dataset"),
        ("state.json", '{"_data_files": [{"filename": "x.arrow"}]}', "No such file"),
        ("state.json", "{", "state.json: cannot be read"),
        ("dataset_dict.json", "{}", "dataset_dict.json: it has no list of splits; save the"),
        ("dataset_dict.json", "[]", "dataset_dict.json: it has no list of splits; save the"),
        ("dataset_dict.json", '{"splits": 1}', "it has no list of splits; save the dataset"),
        ("dataset_dict.json", '{"splits": ["train"]}', "train: no such folder, but dataset_dict"),
        ("dataset_dict.json", '{"splits": [1]}', "split train: it has 1"),
    ],
)
def test_a_damaged_saved_dataset_is_one_line(
    tmp_path: Path, name: str, content: str, says: str
) -> None:
    folder = folder_of(tmp_path / "a", pairs__jsonl=json.dumps(ROW))
    (folder / name).write_text(content)
    assert says in refused(folder)


def test_what_is_no_regular_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert "a.jsonl: a pipe or a device, which cannot be read twice" in refused(
        tmp_path / "a.jsonl"
    )
    assert refused(tmp_path / "b.jsonl").endswith("gone.jsonl, which is not there")


def test_tables_with_tabs_arrow_files_and_zstandard(tmp_path: Path, lines: Path) -> None:
    (tmp_path / "a.tsv").write_text("prompt\tchosen\nQ, R\tgood\n")
    assert values(tmp_path / "a.tsv") == [(2, {"prompt": "Q, R", "chosen": "good"})]
    table = pa.table({"prompt": ["Q", "R"]})
    pa.feather.write_feather(table, tmp_path / "a.arrow")
    assert values(tmp_path / "a.arrow") == [(1, {"prompt": "Q"}), (2, {"prompt": "R"})]
    packed = tmp_path / "b.jsonl.zst"
    packed.write_bytes(pa.compress(lines.read_bytes(), "zstd", asbytes=True))
    assert values(packed) == values(lines)
    packed.write_bytes(b"no such thing")
    assert "cannot be read" in refused(packed) or "not a readable file" in refused(packed)


def test_whole_columns_in_one_json_object_are_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "chosen": "a"}, {"prompt": "R", "chosen": "b"}]
    by_number = {name: {str(n): row[name] for n, row in enumerate(rows)} for name in rows[0]}
    lists = {name: [row[name] for row in rows] for name in rows[0]}
    for columns in (by_number, lists):
        (tmp_path / "a.json").write_text(json.dumps(columns))
        assert [row for _, row in values(tmp_path / "a.json")] == rows
    one = {"prompt": [{"role": "user", "content": "Q"}], "chosen": [{"content": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(one, indent=1))
    assert [row for _, row in values(tmp_path / "a.json")] == [one]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json.gz"])
def test_utf_16_is_named(tmp_path: Path, name: str) -> None:
    content = json.dumps(ROW).encode("utf-16")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert "the text is UTF-16; save it as UTF-8" in refused(tmp_path / name)


def test_missing_file_names_the_nearest(tmp_path: Path, lines: Path) -> None:
    assert (
        refused(tmp_path / "b.jsonl")
        == f"{tmp_path / 'b.jsonl'}: no such file; did you mean a.jsonl?"
    )
    assert "there is no directory" in refused(tmp_path / "none" / "a.jsonl")
    assert "no such file" in refused("./train")
    assert "no such file" in refused("data/of/mine")


def test_what_is_missing_is_refused_without_reading_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_text("no gzip data")
    refuse_missing(Source(source=str(tmp_path / "a.csv.gz")))
    refuse_missing(Source(source="org/set", split="test"))
    refuse_missing(Source(source="https://host.example/a.jsonl"))
    for wrong, says in (
        (Source(source=str(tmp_path / "b.csv.gz")), "no such file; did you mean a.csv.gz?"),
        (Source(source=str(tmp_path / "a.csv.gz"), split="test"), "a file has no splits"),
        (Source(source="https://host.example/a.jsonl", split="test"), "a file has no splits"),
    ):
        with pytest.raises(DataError, match=re.escape(says)):
            refuse_missing(wrong)


def test_the_home_of_nobody() -> None:
    with pytest.raises(
        ConfigError, match=r"^source: ~nosuchuser/a\.jsonl: no user of this server has that name"
    ):
        list(read_rows(Source(source="~nosuchuser/a.jsonl")))


def test_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert "unknown kind of file" in refused(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1}, {"a": 2}', "no comma and no closing bracket after element 2"),
        ('[{"a": 1} {"a": 2}]', "no comma and no closing bracket after element 1"),
        ('[{"a": 1}, {"a": }]', "element 2 is not valid JSON"),
        ('[\n{"a": 1},\n', "does not end after element 1"),
    ],
)
def test_broken_array(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert expected in refused(tmp_path / "a.json")


def test_csv_quote_left_open(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a,b\n1,2\n"3,4\n5,6\n')
    assert "not valid CSV after line 2" in refused(tmp_path / "a.csv")


def test_csv_with_a_column_twice(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,a\n1,2\n")
    assert "names a column twice" in refused(tmp_path / "a.csv")


def test_blanks_after_the_commas_of_a_csv_are_no_part_of_its_cells(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt, "chosen" , rejected\nQ,  "a, ""b""", c\n\nR, d,e f\n')
    assert values(tmp_path / "a.csv") == [
        (2, {"prompt": "Q", "chosen": 'a, "b"', "rejected": "c"}),
        (4, {"prompt": "R", "chosen": "d", "rejected": "e f"}),
    ]
    (tmp_path / "a.csv").write_text("prompt,chosen\nQ, a\n")
    assert values(tmp_path / "a.csv") == [(2, {"prompt": "Q", "chosen": " a"})]
    (tmp_path / "a.csv").write_text('prompt, chosen\nQ, a\n"R\nS", "b" c\n')
    assert "not valid CSV after line 2: the row of line 3: a closing quote is" in refused(
        tmp_path / "a.csv"
    )


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "a;b\n1;2\n", "line 1: the header has semicolons and no comma; save the table"),
        ("a.csv", "a\tb\n1\t2\n", "line 1: the header has tabs and no comma; save the table with"),
        ("a.csv", "a|b\n1|2\n", "line 1: the header has vertical bars and no comma"),
        ("a.tsv", "a,b\n1,2\n", "line 1: the header has commas and no tab"),
        (
            "a.tsv",
            'a\tb\n1\t"x" y\n',
            "the row of line 2: a closing quote is not followed by a tab; put the cell in quotes",
        ),
    ],
)
def test_a_table_with_other_signs_says_what_to_change(
    tmp_path: Path, name: str, text: str, says: str
) -> None:
    (tmp_path / name).write_text(text)
    assert says in refused(tmp_path / name)


def test_parquet_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1junkPAR1")
    assert "Parquet" in refused(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
@pytest.mark.parametrize("seed", range(8))
def test_binary_junk_is_refused_or_bad_but_never_a_crash(
    tmp_path: Path, name: str, seed: int
) -> None:
    junk = random.Random(seed)
    (tmp_path / name).write_bytes(junk.randbytes(junk.choice([1, 40, 4000])))
    try:
        rows = [parse_row(row.text, row.problem) for row in read(tmp_path / name)]
    except DataError as error:
        assert name in str(error) and "\n" not in str(error)
    else:
        assert name.endswith("csv") or not any(isinstance(row, dict) for row in rows)


def test_empty_files_have_no_rows(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.csv"):
        (tmp_path / name).write_text("")
        assert read(tmp_path / name) == []
    (tmp_path / "b.json").write_text("[]")
    assert read(tmp_path / "b.json") == []


# --- remote files and hub names -------------------------------------------------------------------


def test_a_url_is_read_through_fsspec(lines: Path) -> None:
    assert [row.line for row in read(f"file://{lines}")] == [1, 2, 3, 4, 5]


def test_an_unknown_protocol_is_named() -> None:
    assert (
        refused("zz://bucket/a.jsonl")
        == "zz://bucket/a.jsonl: cannot be opened: Protocol not known: zz"
    )


def test_an_import_error_of_a_backend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def lacking(*_: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "open", lacking)
    assert (
        refused("s3://b/a.jsonl")
        == "s3://b/a.jsonl: a Python package is missing: Install s3fs to access S3"
    )


def test_hub_name_while_offline() -> None:
    message = refused("HuggingFaceH4/no_such_set")
    assert "HuggingFaceH4/no_such_set" in message
    assert "offline" in message


def test_a_local_path_wins_over_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "in this directory" in refused("org/set")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError("Dataset 'a/b' is a gated dataset on the Hub."),
            "is gated: accept its terms",
        ),
        (
            ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"),
            "this machine is offline",
        ),
        (ConnectionError("Couldn't reach 'a/b' on the Hub (ReadTimeout)"), "cannot be reached"),
        (
            ValueError("Unknown split \"trian\". Should be one of ['train', 'test']."),
            "has no split 'trian'",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among ['x', 'y']"),
            "set `config` of the source to a configuration: Config name is missing.",
        ),
        (
            ValueError("BuilderConfig 'z' not found. Available: ['x', 'y']"),
            "set `config` of the source to a configuration: BuilderConfig 'z' not found",
        ),
    ],
)
def test_hub_errors_say_what_to_do(error: Exception, expected: str) -> None:
    message = explain_hub_error(Source(source="a/b", split="trian"), error)
    assert expected in message
    assert "\n" not in message


def test_the_configuration_of_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*names: Any, **settings: Any) -> list[dict[str, Any]]:
        asked.append((names, settings))
        return [ROW]

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = Source(source="org/set", config="binarized", split="test")
    assert len(list(read_rows(source))) == 1
    assert asked == [(("org/set", "binarized"), {"split": "test", "revision": None})]
    assert source_labels([source, Source(source="org/set")]) == [
        "org/set/binarized/test",
        "org/set/train",
    ]
    with pytest.raises(DataError, match="config raw: only a hub dataset has configurations"):
        refuse_missing(Source(source="https://host.example/a.jsonl", config="raw"))


def test_a_dataset_that_does_not_exist() -> None:
    from datasets.exceptions import DatasetNotFoundError

    message = explain_hub_error(
        Source(source="trian"), DatasetNotFoundError("Dataset 'trian' doesn't exist")
    )
    assert message.startswith("trian is neither a local file nor a hub dataset")


def test_labels_tell_sources_apart() -> None:
    names = [
        "/data/a/train.jsonl",
        "/data/b/train.jsonl",
        "/data/b/test.jsonl",
        "org/set",
        "s3://bucket/x/c.jsonl",
    ]
    sources = [Source(source=name) for name in names]
    labels = ["a/train.jsonl", "b/train.jsonl", "test.jsonl", "org/set", "c.jsonl"]
    assert source_labels(sources) == labels
    assert source_labels([Source(source="org/set"), Source(source="org/set", split="test")]) == [
        "org/set/train",
        "org/set/test",
    ]


def test_a_parquet_column_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "pairs.parquet"
    columns = [pa.array([text]) for text in ("p", "c", "r", "other")]
    pq.write_table(
        pa.Table.from_arrays(columns, names=["prompt", "chosen", "rejected", "chosen"]), path
    )
    with pytest.raises(
        DataError, match=r"pairs\.parquet: .*there are two columns of the name chosen"
    ):
        list(read_rows(Source(source=str(path))))


@contextmanager
def served(handler: Any) -> Iterator[str]:
    """The address of a server with this handler."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_remote_file_is_read_as_a_local_one(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    with gzip.open(tmp_path / "pairs.jsonl.gz", "wt") as file:
        file.write(json.dumps(ROW) + "\n")
    with served(partial(SimpleHTTPRequestHandler, directory=str(tmp_path))) as address:
        assert read(f"{address}/pairs.jsonl") == read(path)
        assert read(f"{address}/pairs.jsonl.gz") == read(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_remote_table_is_read_as_a_local_one(tmp_path: Path, name: str) -> None:
    table = pa.table({"prompt": ["Q", "R"], "chosen": ["a", "b"]})
    write = pq.write_table if name == "a.parquet" else pa.feather.write_feather
    write(table, tmp_path / name)
    assert read(f"file://{tmp_path / name}") == read(tmp_path / name)


class _Unkind(BaseHTTPRequestHandler):
    """Answers with the status in the path; status 200 promises more bytes than it sends."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.split("/")[1]))
        self.send_header("Content-Length", "5000")
        self.end_headers()
        self.wfile.write(json.dumps(ROW).encode() + b"\n")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (200, "the download broke off; try again: "),
        (401, "cannot be opened: the server answers 401 Unauthorized"),
        (403, "cannot be opened: the server answers 403 Forbidden"),
        (404, "cannot be opened: the server answers 404 Not Found"),
        (500, "cannot be opened: the server answers 500 Internal Server Error"),
    ],
)
def test_a_server_that_gives_no_file_is_one_line(status: int, says: str) -> None:
    with served(_Unkind) as address:
        assert f"{address}/{status}/a.jsonl: {says}" in refused(f"{address}/{status}/a.jsonl")
