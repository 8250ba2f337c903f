"""Preparation by parts: what workers read, what they write, and what a killed one leaves behind."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import cloudpickle
from s3_server import serve
from support import HANG_S, wait_until

from orpo_ray.config.data import DataConfig, Source
from orpo_ray.config.storage import local_path
from orpo_ray.data import maker, parallel, parts, pipeline, raw, readers
from orpo_ray.data.formats import Reading
from orpo_ray.data.maker import ShardMaker, parts_of, rows_of, take, tasks_of
from orpo_ray.data.parts import cut_file
from orpo_ray.data.pipeline import prepare
from orpo_ray.data.raw import read_all
from orpo_ray.data.rows import RowProcessor
from orpo_ray.data.shards import copy_from, pack, save, whole_shards
from orpo_ray.data.sources import read_rows
from orpo_ray.data.store import Artifact
from orpo_ray.data.tokenise import Limits
from orpo_ray.errors import DataError
from orpo_ray.storage import LOCAL, storage_at

Prepare = Callable[..., Artifact]


def pair(number: int) -> dict[str, str]:
    return {
        "prompt": f"question {number}",
        "chosen": f"good {number} " * (number % 7 + 1),
        "rejected": f"bad {number}",
    }


def write_lines(path: Path, count: int = 60) -> Path:
    path.write_text("".join(json.dumps(pair(number)) + "\n" for number in range(count)))
    return path


def write_table(path: Path, count: int = 60) -> Path:
    pq.write_table(pa.Table.from_pylist([pair(n) for n in range(count)]), path, row_group_size=7)
    return path


def write_csv(path: Path, count: int = 60) -> Path:
    rows = (pair(number) for number in range(count))
    lines = (f"{row['prompt']},{row['chosen']},{row['rejected']}\n" for row in rows)
    path.write_text("prompt,chosen,rejected\n" + "".join(lines))
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard for a few rows, as a large file has for thousands."""
    monkeypatch.setattr(parts, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(maker, "_LEAST_BYTES", 300)


@pytest.fixture
def run(tmp_path: Path, chatml_tokenizer: Any, ray_session: None) -> Prepare:
    """Prepares files into a storage of the given name."""

    def run(*files: Path, storage: str = "storage", announce: Any = print) -> Artifact:
        train = [{"source": str(file)} for file in files]
        config = DataConfig.model_validate({"train": train, "max_length": 200})
        return prepare(config, chatml_tokenizer, "print", tmp_path / storage, 1, announce)

    return run


def files_of(artifact: Artifact) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in artifact.path.iterdir()}


# --- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n", "\n   \n"])
@pytest.mark.parametrize("last", ["", "\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n"])
def test_the_parts_of_json_lines_have_the_rows_and_lines_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, last: str, start: str
) -> None:
    lines = [json.dumps({"n": n, "text": "é\u2028x" * (n * 5 % 37)}) for n in range(40)]
    file = tmp_path / "a.jsonl"
    file.write_bytes((start + ending.join(lines) + last).encode())
    whole = list(read_rows(Source(source=str(file))))
    assert len(whole) == 40
    for block_bytes, part_bytes in ((10, 10), (64, 300), (1000, 200), (2**20, 2**20)):
        monkeypatch.setattr(parts, "_BLOCK_BYTES", block_bytes)
        cut = cut_file(file)
        assert cut is not None and cut.size == file.stat().st_size
        found = list(cut.parts(part_bytes))
        assert [row for part in found for row in part.rows()] == whole
        assert (len(found) > 1) == (part_bytes < 2**20)


def test_every_byte_of_a_file_counts_in_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_BLOCK_BYTES", 3)
    file = write_lines(tmp_path / "a.jsonl", 20)
    content = file.read_bytes()
    assert len(content) > 5 * parts._BLOCK_BYTES * parts._SEGMENT_BLOCKS
    digests = set[str]()
    for changed in range(0, len(content), 50):
        file.write_bytes(content[:changed] + b"~" + content[changed + 1 :])
        cut = cut_file(file)
        digests |= {cut.digest} if cut else set()
    cut = cut_file(write_lines(tmp_path / "b.jsonl", 20))
    assert cut is not None and cut.digest not in digests
    assert len(digests) >= len(content) // 50


def test_the_parts_of_a_parquet_file_have_the_rows_of_the_whole(tmp_path: Path) -> None:
    file = write_table(tmp_path / "a.parquet")
    cut = cut_file(file)
    assert cut is not None
    found = list(cut.parts(cut.size // 4))
    assert [row for part in found for row in part.rows()] == list(
        read_rows(Source(source=str(file)))
    )
    assert len(found) in (3, 4)


def test_a_parquet_file_with_a_large_row_group_is_read_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_MOST_GROUP_BYTES", 100)
    assert cut_file(write_table(tmp_path / "a.parquet")) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("array.json", '[{"a": 1},\n{"a": 2}]'),
        ("one.json", '{"a": 1}\n'),
        ("pretty.json", '{\n "a": 1\n}\n'),
        ("broken.jsonl", '{"a": \n{"a": 2}\n'),
        ("lists.jsonl", "[1]\n[2]\n"),
        ("empty.jsonl", ""),
        ("a.csv", "a\n1\n"),
        ("packed.jsonl.gz", "no gzip"),
        ("none.parquet", "no Parquet"),
    ],
)
def test_other_files_are_read_from_start_to_end(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert cut_file(tmp_path / name) is None


@pytest.mark.parametrize("window", [4, 30, 1000])
def test_an_array_is_read_a_window_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(readers, "_WINDOW_BYTES", window)
    values = [{"n": n, "text": 'é\\"]}' * n} for n in range(12)] + [7, 123456, "text", [1, [2]]]
    for indent in (None, 1):
        (tmp_path / "a.json").write_text(json.dumps(values, indent=indent, ensure_ascii=False))
        rows = list(read_rows(Source(source=str(tmp_path / "a.json"))))
        assert [json.loads(row.text) for row in rows] == values
        assert [row.line for row in rows] == list(range(1, 17))


def test_the_end_of_a_part_may_have_no_rows(
    tmp_path: Path, run: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_BLOCK_BYTES", 10)
    monkeypatch.setattr(maker, "_LEAST_BYTES", 10)
    lines = write_lines(tmp_path / "a.jsonl", 5)
    lines.write_text(lines.read_text() + " " * 50)
    groups = tmp_path / "b.parquet"
    table = pa.Table.from_pylist([pair(number) for number in range(5, 9)])
    with pq.ParquetWriter(groups, table.schema) as writer:
        writer.write_table(table)
        writer.write_table(table.slice(0, 0))
    assert run(lines, groups).summary.read == 9


def test_a_part_that_cannot_be_read_is_one_line(tmp_path: Path, run: Prepare) -> None:
    write_table(tmp_path / "a.parquet")
    column = pa.array([b"fine"] * 30 + [b"\xff"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": column, "chosen": column, "rejected": column})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=10)
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read.*'utf-8' codec"):
        run(tmp_path / "b.parquet")


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_whole_columns_in_one_line_may_end_with_blank_lines(tmp_path: Path, end: str) -> None:
    columns = {name: {"0": "a", "1": "b"} for name in ("prompt", "chosen", "rejected")}
    (tmp_path / "a.json").write_text(json.dumps(columns) + end)
    assert cut_file(tmp_path / "a.json") is None
    assert len(list(read_rows(Source(source=str(tmp_path / "a.json"))))) == 2


def test_a_wrong_element_is_named_before_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_WINDOW_BYTES", 1000)
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": nope}' + ', {"a": 2}' * 50_000 + "]")
    grown: list[int] = []
    grow = readers._Window._grow
    monkeypatch.setattr(readers._Window, "_grow", lambda window: grown.append(1) or grow(window))
    with pytest.raises(DataError, match="element 2 is not valid JSON"):
        list(read_rows(Source(source=str(tmp_path / "a.json"))))
    assert len(grown) < 3


def test_all_files_of_a_folder_are_trained_on_with_its_weight(tmp_path: Path, run: Prepare) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_lines(folder / "a.jsonl", 5)
    lines = [json.dumps(pair(number)) + "\n" for number in range(5, 9)]
    (folder / "b.jsonl").write_text("".join(lines))
    evaluation = write_csv(tmp_path / "c.csv", 3)
    config = DataConfig.model_validate(
        {
            "train": [{"source": str(folder), "weight": 2}],
            "eval": [{"source": str(evaluation)}],
            "max_length": 200,
        }
    )
    sources = [raw.source for raw in read_all(config) if raw.split == "train"]
    assert [source.weight for source in sources] == [2, 2]
    artifact = run(folder)
    assert [source["kept"] for source in artifact.summary.sources] == [5, 4]


# --- shards ---------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.usefixtures("small")
def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path: Path, run: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        write_lines(tmp_path / "a.jsonl"),
        write_csv(tmp_path / "b.csv", 70),
        write_table(tmp_path / "c.parquet", 80),
    ]
    alone = run(*files, storage="alone")
    monkeypatch.setattr(parallel, "_ALONE_BYTES", 0)
    monkeypatch.setattr(parallel, "_WAVE_BYTES", 1000)
    many = run(*files, storage="many")
    assert files_of(alone) == files_of(many)
    names = sorted(files_of(alone))
    assert len([name for name in names if name.startswith("pairs-0000")]) > 12
    assert {name[:11] for name in names if name.startswith("pairs-")} == {
        "pairs-00000",
        "pairs-00001",
        "pairs-00002",
    }
    # 60 pairs are in all three files, 10 more in two of them.
    assert (alone.summary.read, alone.summary.duplicates) == (210, 130)


@pytest.mark.usefixtures("small")
def test_rows_that_are_not_kept_are_read_twice_and_give_the_same(
    tmp_path: Path, run: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_csv(tmp_path / "a.csv")
    kept = run(file, storage="kept")
    monkeypatch.setattr(raw, "_KEPT_BYTES", 100)
    assert files_of(run(file, storage="read-twice")) == files_of(kept)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_file_that_changes_while_it_is_prepared(
    tmp_path: Path, run: Prepare, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write = write_csv if name == "a.csv" else write_lines
    file = write(tmp_path / name)
    monkeypatch.setattr(raw, "_KEPT_BYTES", 0)
    monkeypatch.setattr(pipeline, "refuse_whole_file", lambda *_: write(tmp_path / name, 61))
    with pytest.raises(DataError, match="it changed while it was being prepared; start again"):
        run(file)
    assert not (tmp_path / "storage").exists()


def test_a_worker_that_sees_neither_file_nor_folder(tmp_path: Path, chatml_tokenizer: Any) -> None:
    """On another server: the driver reads the file for it, and writes what it makes."""
    file = write_lines(tmp_path / "a.jsonl")
    config = DataConfig.model_validate({"train": [{"source": str(file)}], "max_length": 200})
    sources = read_all(config)
    found = parts_of(sources)
    processor = RowProcessor(chatml_tokenizer, ["a"], Limits(100, 200, "drop"), Reading())
    folder, gone = tmp_path / "folder", tmp_path / "no-sign"
    make = ShardMaker(processor, parts=found, folder=folder, sign=gone, kept_in=LOCAL)
    [task] = tasks_of(sources, found, done=())
    here, data = take(make(task))
    assert data is not None and not folder.exists()
    [(place, part)] = found.items()
    task_of_rows = rows_of(place, part)
    stamp = file.stat()
    os.utime(file, (stamp.st_atime, stamp.st_mtime + 1))
    assert take(make(task))[0].name == ""
    assert take(make(task_of_rows)) == (here, data)
    with pytest.raises(DataError, match="it changed while"):
        rows_of(place, part)


def test_a_worker_of_another_server_stores_its_shard_in_the_bucket(
    tmp_path: Path, chatml_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DataConfig.model_validate(
        {"train": [{"source": str(write_lines(tmp_path / "a.jsonl"))}], "max_length": 200}
    )
    sources = read_all(config)
    found = parts_of(sources)
    [task] = tasks_of(sources, found, done=())
    processor = RowProcessor(chatml_tokenizer, ["a"], Limits(100, 200, "drop"), Reading())
    with serve() as server:
        for name, value in {**server.environment, "XDG_CACHE_HOME": str(tmp_path / "one")}.items():
            monkeypatch.setenv(name, value)
        kept_in = storage_at("s3://bucket/runs")
        folder = local_path("s3://bucket/runs") / "artifacts" / "some"
        make = ShardMaker(
            processor, parts=found, folder=folder, sign=tmp_path / "gone", kept_in=kept_in
        )
        travelling = cloudpickle.dumps(make)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
        made = cloudpickle.loads(travelling)(task)
        assert not folder.exists()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
        shard = parallel._taken(made, folder, kept_in)
        assert whole_shards(folder) == {(0, 0): shard}
        assert list(server.bucket.under("runs/artifacts/some/")) == [shard.name]


def test_a_shard_that_cannot_be_written_is_an_error_of_ours(
    tmp_path: Path, chatml_tokenizer: Any
) -> None:
    config = DataConfig.model_validate(
        {"train": [{"source": str(write_lines(tmp_path / "a.jsonl"))}], "max_length": 200}
    )
    sources = read_all(config)
    found = parts_of(sources)
    processor = RowProcessor(chatml_tokenizer, ["a"], Limits(100, 200, "drop"), Reading())
    make = ShardMaker(
        processor, parts=found, folder=tmp_path / "gone", sign=tmp_path, kept_in=LOCAL
    )
    [task] = tasks_of(sources, found, done=())
    with pytest.raises(DataError, match="cannot write the prepared data to"):
        take(make(task))


def test_whole_shards_are_found_and_damaged_ones_deleted(tmp_path: Path) -> None:
    draw = random.Random(0)
    tables = [pa.table({"line": [draw.random() for _ in range(9)]}) for _ in range(3)]
    packed = [pack((0, piece), rows) for piece, rows in enumerate(tables)]
    for shard, data in packed:
        save(tmp_path, shard, data)
    assert list(whole_shards(tmp_path).values()) == [shard for shard, _ in packed]
    assert copy_from(tmp_path / packed[1][0].name, lambda rows: rows) == tables[1]
    damaged = tmp_path / packed[1][0].name
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert sorted(whole_shards(tmp_path)) == [(0, 0), (0, 2)]
    assert not damaged.exists()


# --- a preparation that is killed -----------------------------------------------------------------

_SLOW = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from orpo_ray.config.data import DataConfig
from orpo_ray.data import maker, parallel, parts
from orpo_ray.data.pipeline import prepare
tokenizer, file, storage = sys.argv[1:]
parts._BLOCK_BYTES, maker._LEAST_BYTES = 100, 300
take, taken = parallel.take, []
def once(made):
    taken.append(take(made))
    print(len(taken), flush=True)
    if len(taken) == 5:
        sys.stdin.read()  # until it is killed
    return taken[-1]
parallel.take = once
config = DataConfig.model_validate({"train": [{"source": file}], "max_length": 200})
prepare(config, AutoTokenizer.from_pretrained(tokenizer), "print", Path(storage), 1, print)
"""


@pytest.mark.usefixtures("small")
def test_a_killed_preparation_goes_on_with_its_shards(
    tmp_path: Path, run: Prepare, chatml_tokenizer: Any
) -> None:
    file = write_lines(tmp_path / "a.jsonl")
    whole = run(file, storage="whole")
    command = [sys.executable, "-c", _SLOW, chatml_tokenizer.name_or_path, str(file)]
    process = subprocess.Popen(
        [*command, str(tmp_path / "storage")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    folder = tmp_path / "storage" / "artifacts" / whole.path.name
    try:
        wait_until(partial(_has_shards, folder, 5), "five shards", HANG_S)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    said: list[str] = []
    artifact = run(file, announce=said.append)
    assert "shards of an earlier preparation, used again: 5" in said
    assert files_of(artifact) == files_of(whole)
    assert len(files_of(whole)) > 10


def _has_shards(folder: Path, count: int) -> bool:
    return len(list(folder.glob("pairs-*"))) >= count
