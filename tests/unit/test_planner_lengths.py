"""Lengths of pairs are from the nearest place that has them, and are about those of the run."""

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import BASE, DEMO, demo_pairs, make_artifact, run_config, write_pairs

from orpo_ray.config import RunConfig
from orpo_ray.config.data import DataConfig
from orpo_ray.errors import ConfigError, DataError
from orpo_ray.planner.lengths import Lengths, find_lengths
from orpo_ray.training.plan import longer_side

ROWS = 5000
LONG = {"max_length": 2048, "max_prompt_length": 1024}


def demo_rows(count: int) -> list[dict[str, Any]]:
    """Rows of the demo, again and again; each asks with its number, so that none stands twice."""
    lines = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(lines[number % len(lines)]) for number in range(count)]
    for number, row in enumerate(rows):
        row["prompt"][0]["content"] += f" {number}"
    return rows


def flat(row: dict[str, Any]) -> dict[str, str]:
    return {side: row[side][0]["content"] for side in ("prompt", "chosen", "rejected")}


def found(storage: Path, source: Path, **data: Any) -> Lengths:
    own = {"train": [{"source": str(source)}], "eval": [], **LONG, **data}
    return find_lengths(run_config(storage, data=own))


def write_lines(path: Path, rows: list[dict[str, Any]], opened: Any = open) -> Path:
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)
    return path


def write_file(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """The rows as a file of the kind that its name says."""
    path = folder / name
    if name.endswith(".csv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
            table.writeheader()
            table.writerows(map(flat, rows))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(list(map(flat, rows))), path)
    elif name.endswith(".arrow"):
        table = pa.Table.from_pylist(list(map(flat, rows)))
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        write_lines(path, rows, gzip.open if name.endswith(".gz") else open)
    return path


KINDS = ["p.jsonl", "p.jsonl.gz", "p.csv", "p.parquet", "p.arrow", "p.json"]


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_a_file_are_counted(tmp_path, name):
    sampled = found(tmp_path / "s", write_file(tmp_path, name, demo_rows(ROWS)))
    assert sampled.pairs is not None
    assert sampled.pairs + sampled.held_out == ROWS
    assert sampled.held_out == round(ROWS * 0.05)
    assert len(sampled.lengths) == 2000


def test_a_pair_that_stands_twice_counts_once(tmp_path):
    sampled = found(tmp_path / "s", write_file(tmp_path, "p.jsonl", 2 * demo_rows(500)))
    assert (sampled.pairs, sampled.held_out, len(sampled.lengths)) == (475, 25, 500)


AHEAD = {"gz": 0.3, "json": 0.3, "arrow": 0.1}
"""Their readers are ahead of their rows: 128 KiB packed, 1 MiB, one batch and the end of the file.
That is much of the small file of this test, and little of one of which 16 MiB are counted.
"""


@pytest.mark.parametrize("name", KINDS)
def test_the_rows_of_a_large_file_go_by_its_size(tmp_path, monkeypatch, name):
    """As if a file were large: only some hundred rows after the sample are counted."""
    monkeypatch.setattr("orpo_ray.planner.lengths._COUNTED", 200_000)
    many = 20_000
    sampled = found(tmp_path / "s", write_file(tmp_path, name, demo_rows(many)))
    assert sampled.pairs is not None
    counted = sampled.pairs + sampled.held_out
    assert counted == pytest.approx(many, rel=AHEAD.get(name.rpartition(".")[2], 0.04))


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_limit_and_weight_count(tmp_path, name):
    path = write_file(tmp_path, name, demo_rows(3000))
    train = [{"source": str(path), "limit": 2400, "weight": 2.0}]
    sampled = find_lengths(run_config(tmp_path, data={"train": train, "eval": [], **LONG}))
    assert sampled.pairs is not None
    assert sampled.pairs + sampled.held_out == 4800


def test_held_out_pairs_of_their_own_are_counted_apart(tmp_path):
    own = [{"source": str(write_file(tmp_path, "e.jsonl", demo_rows(30)))}]
    sampled = found(tmp_path, write_file(tmp_path, "p.jsonl", demo_rows(100)), eval=own)
    assert (sampled.pairs, sampled.held_out) == (100, 30)


def test_the_tokenizer_of_the_base_counts_as_the_run_does(tmp_path):
    """The marks of a template are assumed to be those of ChatML."""
    real = np.array(
        [
            [len(pair.prompt), len(pair.chosen), len(pair.rejected)]
            for pair in demo_pairs("train", 60)
        ]
    )
    lines = (DEMO / "train.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    sampled = found(tmp_path, write_lines(tmp_path / "p.jsonl", list(map(json.loads, lines))))
    assert sampled.lengths.shape == real.shape
    apart = sampled.lengths - real
    assert str(BASE / "tokenizer.json") in sampled.source
    assert not apart.any(), "the demo's template has the marks of ChatML"
    assert not sampled.is_assumed


def test_without_a_tokenizer_four_characters_are_a_token(tmp_path):
    path = write_lines(
        tmp_path / "p.jsonl", [{"prompt": "p" * 400, "chosen": "c" * 200, "rejected": "r" * 80}]
    )
    own = {"train": [{"source": str(path)}], "eval": [], **LONG}
    sampled = find_lengths(run_config(tmp_path, data=own, model={"base": "owner/base"}))
    assert sampled.lengths.tolist() == [[100 + 8, 50 + 1, 20 + 1]], "and the marks of ChatML"
    assert "4 characters" in sampled.source


def test_a_broken_tokenizer_is_one_clear_error(tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}", encoding="utf-8")
    config = run_config(tmp_path, model={"base": str(tmp_path / "base")})
    with pytest.raises(ConfigError, match=r"model\.base: .*tokenizer\.json cannot be read"):
        find_lengths(config)


def test_rows_that_are_no_pairs_are_left_out(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", demo_rows(80))
    with path.open("a", encoding="utf-8") as file:
        file.write("{broken\n[1, 2]\n" + '{"prompt": "alone"}\n' * 18)
    sampled = found(tmp_path, path)
    assert len(sampled.lengths) == 80
    assert sampled.pairs is not None
    assert sampled.pairs + sampled.held_out == 80


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": "alone"}\n', "hold no pair that can be read; orpo-ray prepare says why"),
        ("", "hold no pair that can be read"),
        ("{broken\n", "hold no pair that can be read"),
    ],
)
def test_a_file_without_pairs_is_refused(tmp_path, content, said):
    (tmp_path / "p.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        found(tmp_path, tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "folder/missing.parquet", "*.jsonl", "no/such/dir"]
)
def test_a_missing_file_is_refused_and_not_assumed(tmp_path, name):
    with pytest.raises(DataError, match=r"no such file|no file matches"):
        found(tmp_path / "s", tmp_path / "pairs" / name)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "p.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="gzip data is damaged"):
        found(tmp_path, tmp_path / "p.jsonl.gz")


def test_pairs_that_are_too_long_are_dropped_and_no_pair_left_is_an_error(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", demo_rows(60))
    whole = found(tmp_path, path)
    limit = int(np.median(longer_side(whole.lengths)))
    short = found(tmp_path, path, max_length=limit, max_prompt_length=limit - 1)
    assert 0 < len(short.lengths) < 60
    assert longer_side(short.lengths).max() <= limit
    assert short.pairs is not None and whole.pairs is not None
    assert short.pairs == round(whole.pairs * len(short.lengths) / 60)
    with pytest.raises(DataError, match=r"data\.max_length: no pair has at most 8 tokens"):
        found(tmp_path, path, max_length=8, max_prompt_length=4)


def test_prompts_are_cut_as_the_run_cuts_them(tmp_path):
    path = write_lines(
        tmp_path / "p.jsonl", [{"prompt": "p" * 4000, "chosen": "c" * 200, "rejected": "r" * 80}]
    )
    own = {"max_length": 500, "max_prompt_length": 300, "overlong": "truncate-prompt-left"}
    data = {"train": [{"source": str(path)}], "eval": [], **own}
    cut = find_lengths(run_config(tmp_path, data=data, model={"base": "owner/base"}))
    assert cut.lengths.tolist() == [[300, 51, 21]]


# --- prepared pairs -------------------------------------------------------------------------------


def prepared(storage: Path, config: RunConfig, count: int = 36, **settings: Any) -> Path:
    """Prepared pairs of a config, which say that they are."""
    path = write_pairs(storage, demo_pairs("train", count), demo_pairs("h1", 8)).path
    manifest = path / "artifact.json"
    summary = json.loads(manifest.read_text(encoding="utf-8"))
    data: DataConfig = config.data
    summary["settings"] = {
        **data.model_dump(mode="json", exclude={"train", "eval"}),
        "columns": None,
        "eval_fraction": None,
        "single_answers": False,
        **settings,
    }
    summary["sources"] = [
        {**source.model_dump(mode="json"), "used_for": split}
        for split in ("train", "eval")
        for source in getattr(data, split)
    ]
    manifest.write_text(json.dumps(summary), encoding="utf-8")
    return path


def test_prepared_pairs_are_preferred(tmp_path):
    config = run_config(tmp_path)
    path = prepared(tmp_path, config)
    near = find_lengths(config)
    assert near.source == f"prepared pairs in {path}"
    assert (near.pairs, near.held_out, near.lengths.shape) == (36, 8, (36, 3))


@pytest.mark.parametrize(
    "other",
    [
        {"max_length": 64},
        {"train_on": "all-assistant"},
        {"dedup": "near"},
        {"single_answers": True},
        {"columns": {"prompt": "p", "chosen": "c", "rejected": "r"}},
    ],
)
def test_pairs_that_were_prepared_in_another_way_are_not_taken(tmp_path, other):
    config = run_config(tmp_path)
    prepared(tmp_path, config, **other)
    assert find_lengths(config).source.startswith("the first 36 pairs")


def test_pairs_of_other_sources_or_damaged_ones_are_not_taken(tmp_path):
    config = run_config(tmp_path)
    make_artifact(tmp_path, train=12)
    assert find_lengths(config).source.startswith("the first 36 pairs")
    path = prepared(tmp_path, config)
    (path / "train.arrow").unlink()
    assert find_lengths(config).source.startswith("the first 36 pairs")
    (path / "artifact.json").write_text("[]", encoding="utf-8")
    assert find_lengths(config).source.startswith("the first 36 pairs")


# --- assumed --------------------------------------------------------------------------------------


def assumed(storage: Path, source: str, split: str = "train", **data: Any) -> Lengths:
    train = [{"source": source, "split": split}]
    return find_lengths(run_config(storage, data={"train": train, "eval": [], **LONG, **data}))


def test_a_known_data_set_has_its_rows_and_usual_lengths(tmp_path):
    known = assumed(tmp_path, "HuggingFaceH4/ultrafeedback_binarized", "train_prefs")
    assert known.is_assumed and known.pairs is not None
    assert 0.9 * 61135 < known.pairs + known.held_out <= 61135
    assert "assumed" in known.source and "orpo-ray prepare tells" in known.source
    limited = assumed(tmp_path, "trl-lib/kto-mix-14k", eval_fraction=0.1)
    assert limited.pairs is not None
    assert limited.held_out == pytest.approx(0.1 * (limited.pairs + limited.held_out), abs=1)


def test_an_unknown_data_set_has_usual_lengths_and_no_number(tmp_path):
    unknown = assumed(tmp_path, "owner/pairs")
    assert (unknown.pairs, unknown.held_out) == (None, 0)
    limited = find_lengths(
        run_config(
            tmp_path, data={"train": [{"source": "owner/pairs", "limit": 5000}], "eval": [], **LONG}
        )
    )
    assert limited.pairs is not None and limited.pairs + limited.held_out > 4000


@pytest.mark.parametrize("limit", [8, 64, 512, 2048, 8192])
@pytest.mark.parametrize("source", ["owner/pairs", "Intel/orca_dpo_pairs"])
def test_no_assumed_pair_is_longer_than_the_run_allows_and_one_is_as_long(tmp_path, source, limit):
    pairs = assumed(tmp_path, source, max_length=limit, max_prompt_length=limit // 2)
    assert longer_side(pairs.lengths).max() == limit
    assert pairs.lengths[:, 0].max() <= limit // 2
