"""The artifact on disk: it is read as it was written, found again, and never half finished."""

import hashlib
import json
import multiprocessing
import os
import pickle
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orpo_ray.data import shards, store
from orpo_ray.data.formats import Reading
from orpo_ray.data.rows import RAW, RowProcessor
from orpo_ray.data.store import (
    SCHEMA,
    Artifact,
    PairTable,
    Summary,
    artifact_path,
    begin_artifact,
    content_hash,
    find_artifact,
    open_artifact,
)
from orpo_ray.data.tokenise import Limits
from orpo_ray.errors import DataError
from tests.support import write_tables

ROWS = [
    {"pair_id": "a.jsonl:1", "prompt": [1, 2, 3], "chosen": [4, 5], "rejected": [6]},
    {"pair_id": "a.jsonl:3", "prompt": [7], "chosen": [8], "rejected": [9, 10, 11, 12]},
    {"pair_id": "a.jsonl:4", "prompt": [1, 2], "chosen": [3, 4, 5], "rejected": [6, 7]},
]
BAD = {"file": "a.jsonl", "line": 2, "reason": "identical", "detail": "", "split": "train"}
DIGEST = content_hash("some settings", ["rows"])


def summary(digest: str = DIGEST) -> Summary:
    return Summary(
        hash=digest,
        settings={"seed": 1},
        sources=[],
        read=4,
        train=3,
        eval=1,
        bad={"identical": 1},
        overlong=0,
        truncated=0,
        duplicates=0,
        overlap=0,
        multi_turn=0,
        held_out=False,
    )


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def write(storage: Path, train: list[dict[str, Any]] = ROWS) -> Artifact:
    return write_tables(storage, summary(), table(train), table(ROWS[:1]), [BAD])


def find(storage: Path) -> tuple[Artifact | None, list[str]]:
    said: list[str] = []
    return find_artifact(storage, DIGEST, said.append), said


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    artifact = write(tmp_path)
    assert artifact.path == tmp_path / "artifacts" / DIGEST[:16]
    assert sorted(file.name for file in artifact.path.iterdir()) == [
        "artifact.json",
        "eval.arrow",
        *(name for name in artifact.summary.files if name.startswith("pairs-")),
        "quarantine.jsonl",
        "train.arrow",
    ]
    assert len(artifact.summary.files) == 5
    assert (len(artifact.train), len(artifact.eval)) == (3, 1)
    pair = artifact.train[1]
    assert (pair.pair_id, pair.prompt.tolist(), pair.rejected.tolist()) == (
        "a.jsonl:3",
        [7],
        [9, 10, 11, 12],
    )
    assert pair.chosen.dtype == np.int32
    assert artifact.train.lengths.tolist() == [[3, 2, 1], [1, 1, 4], [2, 3, 2]]
    assert artifact.train.pair_ids == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4"]
    assert [one.pair_id for one in artifact.train] == artifact.train.pair_ids
    assert [json.loads(line) for line in (artifact.path / "quarantine.jsonl").open()] == [BAD]
    assert artifact.summary.token_lengths["rejected"] == {"p50": 2, "p90": 4, "p99": 4, "max": 4}


def test_random_access_over_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BATCH_ROWS", 7)
    rows = [
        {"pair_id": f"f:{n}", "prompt": list(range(n % 5 + 1)), "chosen": [n], "rejected": [n, n]}
        for n in range(50)
    ]
    train = write(tmp_path, rows).train
    for index in (0, 6, 7, 13, 14, 48, 49):
        assert train[index].pair_id == f"f:{index}"
        assert train[index].rejected.tolist() == [index, index]
    assert train.lengths[:, 0].tolist() == [n % 5 + 1 for n in range(50)]
    with pytest.raises(IndexError):
        train[50]


def test_pairs_may_be_written_into_without_touching_the_file(tmp_path: Path) -> None:
    train = write(tmp_path).train
    train[0].prompt[0] = 99
    assert train[0].prompt.tolist() == [1, 2, 3]


def test_a_table_travels_by_its_path(tmp_path: Path) -> None:
    train = write(tmp_path).train
    data = pickle.dumps(train)
    assert len(data) < 1000
    assert pickle.loads(data)[2].chosen.tolist() == [3, 4, 5]


def test_an_empty_table(tmp_path: Path) -> None:
    evaluation = write_tables(tmp_path, summary(), table(ROWS), table([])).eval
    assert (len(evaluation), evaluation.lengths.shape, evaluation.pair_ids) == (0, (0, 3), [])


def test_found_again_by_its_hash(tmp_path: Path) -> None:
    assert find(tmp_path) == (None, [])
    written = write(tmp_path)
    found, said = find(tmp_path)
    assert found is not None
    assert (found.path, found.summary, said) == (written.path, written.summary, [])


def test_the_hash_covers_settings_rows_and_code_version(monkeypatch: pytest.MonkeyPatch) -> None:
    same = content_hash({"b": 1, "a": 2}, ["x"])
    assert content_hash({"a": 2, "b": 1}, ["x"]) == same
    assert content_hash({"a": 2, "b": 1}, ["y"]) != same
    monkeypatch.setattr(store, "DATA_VERSION", store.DATA_VERSION + 1)
    assert content_hash({"a": 2, "b": 1}, ["x"]) != same


GOLDEN = {6: "b2fbb47c413d38f9"}
"""Digest of the tokens of GOLDEN_ROWS, by DATA_VERSION."""

TALK = [
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
    {"role": "user", "content": "Q3"},
]
GOLDEN_ROWS: list[dict[str, Any]] = [
    {"prompt": "Q", "chosen": "good", "rejected": "bad"},
    {
        "prompt": TALK,
        "system": "S",
        "chosen": [TALK[-1], {"role": "assistant", "content": " good "}],
        "rejected": [TALK[-1], {"role": "assistant", "content": "bad"}],
    },
    {
        "chosen": [*TALK, {"role": "assistant", "content": "é"}],
        "rejected": [*TALK, {"role": "assistant", "content": "b"}],
    },
    {"chosen": "\n\nHuman: Q\n\nAssistant: good</s>", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
    {"prompt": "Human: Q\n\nAssistant:", "chosen": "\ngood", "rejected": "bad\n"},
    {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": "b",
    },
    {
        "instruction": "Q",
        "input": "I",
        "history": [["q", "a"]],
        "system": "S",
        "chosen": "good",
        "rejected": "bad",
    },
    {"messages": TALK, "chosen": "good", "rejected": "bad"},
    {"input": "Q", "output_1": "bad", "output_2": "good", "label": 2},
    {"input": {"messages": TALK}, "preferred_output": "good", "non_preferred_output": "bad"},
    {"prompt": "long " * 40, "chosen": "good", "rejected": "bad"},
]


def golden_tokenizer() -> Any:
    """A tokenizer with one token a byte: only this project's own code shapes the ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE({letter: number for number, letter in enumerate(alphabet)}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + '\n' "
        "}}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def test_other_tokens_from_the_same_rows_need_another_data_version() -> None:
    texts = [json.dumps(row).encode() for row in GOLDEN_ROWS]
    block = pa.Table.from_pylist(
        [
            {"source": 0, "line": line, "text": text, "problem": ""}
            for line, text in enumerate(texts, 1)
        ],
        schema=RAW,
    )
    processor = RowProcessor(
        golden_tokenizer(), ["a"], Limits(120, 240, "truncate-prompt-left"), Reading()
    )
    made = processor(block).select(["code", *SCHEMA.names]).to_pylist()
    assert [row["code"] for row in made] == [""] * len(GOLDEN_ROWS)
    digest = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]
    assert {store.DATA_VERSION: digest} == GOLDEN, (
        "the same rows now give other tokens: raise store.DATA_VERSION, or users train on stale "
        "artifacts; then set "
        f"GOLDEN to the new version and {digest}"
    )


@pytest.mark.parametrize(
    ("pattern", "how"),
    [
        *product(
            ["train.arrow", "eval.arrow", "quarantine.jsonl", "pairs-00000-00001-*.arrow"],
            ["cut", "changed", "gone"],
        ),
        ("artifact.json", "cut"),
        ("artifact.json", "changed"),
    ],
)
def test_a_damaged_artifact_is_named_and_built_again(
    tmp_path: Path, pattern: str, how: str
) -> None:
    [file] = write(tmp_path).path.glob(pattern)
    data, name = file.read_bytes(), file.name
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[:-3])
    else:
        file.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    found, said = find(tmp_path)
    assert found is None
    assert len(said) == 1 and "is damaged" in said[0] and name in said[0]
    again = write(tmp_path)
    assert again.train.pair_ids == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4"]
    assert find(tmp_path)[1] == []
    assert [entry.name for entry in (tmp_path / "artifacts").iterdir()] == [DIGEST[:16]]


def test_an_artifact_is_there_when_its_manifest_is(tmp_path: Path) -> None:
    (write(tmp_path).path / "artifact.json").unlink()
    assert find(tmp_path) == (None, [])


def test_an_artifact_that_was_finished_meanwhile_stays(tmp_path: Path) -> None:
    path = write(tmp_path).path
    assert begin_artifact(tmp_path, DIGEST) == path
    assert find(tmp_path)[0] is not None
    (path / "train.arrow").write_bytes(b"")
    begin_artifact(tmp_path, DIGEST)
    assert not (path / "artifact.json").exists()


def test_what_nobody_has_gone_on_with_for_a_day_is_deleted(tmp_path: Path) -> None:
    path = write(tmp_path).path
    (path / "artifact.json").unlink()
    shard = next(path.glob("pairs-*"))
    yesterday = time.time() - 25 * 3600
    for file in (*path.iterdir(), path):
        os.utime(file, (yesterday, yesterday))
    begin_artifact(tmp_path, content_hash("other"))
    assert not path.exists()
    path = write(tmp_path).path
    (path / "artifact.json").unlink()
    begin_artifact(tmp_path, content_hash("other"))
    assert (path / shard.name).exists()


def test_a_full_or_forbidden_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write(tmp_path / "file")


def test_a_folder_that_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not prepared data"):
        open_artifact(tmp_path)


def _write_at_once(storage: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    results.put(len(write(storage).train))


def test_processes_that_finish_together_share_one_artifact(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_write_at_once, args=(tmp_path, barrier, results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [results.get(timeout=10) for _ in processes] == [3, 3, 3]
    assert [entry.name for entry in (tmp_path / "artifacts").iterdir()] == [
        artifact_path(tmp_path, DIGEST).name
    ]


def test_a_table_opens_from_its_path_alone(tmp_path: Path) -> None:
    assert len(PairTable(write(tmp_path).path / "train.arrow")) == 3
