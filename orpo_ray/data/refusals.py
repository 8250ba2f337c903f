"""Refuses data that must not be trained on: too many bad rows, or no pair left."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orpo_ray.config.data import DataConfig
from orpo_ray.data.checks import DROPPED, OVERLONG, explain
from orpo_ray.data.pairs import Refusal
from orpo_ray.data.raw import RawSource
from orpo_ray.data.store import Artifact, Summary
from orpo_ray.errors import DataError

_TOP_REASONS = 3


def refuse_bad_data(rows: pa.Table, sources: Sequence[RawSource], data: DataConfig) -> None:
    """Raise DataError if `overlong`, `bad_rows` or `max_bad_fraction` of the config asks for it."""
    columns = rows.select(["source", "line", "nth", "code", "detail"])
    failures = columns.filter(pc.not_equal(columns["code"], "")).to_pylist()
    overlong = next((row for row in failures if row["code"] in OVERLONG), None)
    if overlong and data.overlong == "error":
        raise DataError(f"{_where(overlong, sources)} (data.overlong is error)")
    bad = [row for row in failures if row["code"] not in DROPPED]
    if bad and data.bad_rows == "fail":
        raise DataError(f"{_where(bad[0], sources)} (data.bad_rows is fail)")
    total = pc.sum(pc.equal(rows["nth"], 0)).as_py() or 0
    bad = [row for row in bad if not row["nth"]]  # a row of several pairs counts once
    if len(bad) > data.max_bad_fraction * total:
        top = Counter(row["code"] for row in bad).most_common(_TOP_REASONS)
        first = {code: next(row for row in bad if row["code"] == code) for code, _ in top}
        reasons = "; ".join(
            f"{count} x {code}, first {_where(first[code], sources)}" for code, count in top
        )
        raise DataError(
            f"{len(bad)} of {total} rows are bad, more than data.max_bad_fraction "
            f"({data.max_bad_fraction:g}) allows: {reasons}"
        )


def _where(row: dict[str, Any], sources: Sequence[RawSource]) -> str:
    return (
        f"{sources[row['source']].source.source}:{row['line']}: "
        f"{explain(Refusal(row['code'], row['detail']))}"
    )


def refuse_empty(summary: Summary, data: DataConfig) -> None:
    """Raise DataError if no pair is left to train on, or no pair of `data.eval`."""
    for split, count in (("train", summary.train), ("eval", summary.eval)):
        if not count and (split == "train" or data.eval):
            if split == "train":
                _refuse_weightless(summary)
            of_split = [source for source in summary.sources if source["used_for"] == split]
            read = sum(source["read"] for source in of_split)
            overlong = sum(source["overlong"] for source in of_split)
            why = f"; {overlong} are longer than {_limits(data)}" if overlong else ""
            raise DataError(f"data.{split}: no usable pair is left of {read} rows{why}")


def refuse_one_kind(artifact: Artifact) -> None:
    """Raise DataError if all answers of a split are good, or all are bad: nothing is compared."""
    for split, table in (("train", artifact.train), ("eval", artifact.eval)):
        counts = np.count_nonzero(table.lengths[:, 1:], axis=0)
        for count, missing, kind in zip(counts, ("good", "bad"), ("bad", "good"), strict=True):
            if len(table) and not count:
                which = "answers to train on" if split == "train" else "held-out answers"
                raise DataError(
                    f"data: all {which} are {kind}; a comparison needs {missing} ones, too: add "
                    "some, each with a prompt of its own"
                )


def _limits(data: DataConfig) -> str:
    return f"data.max_length={data.max_length} or max_prompt_length={data.max_prompt_length}"


def _refuse_weightless(summary: Summary) -> None:
    """Raise DataError if a source has training pairs, but its weight is too small to keep one."""
    for source in summary.sources:
        if source["used_for"] == "train" and source["kept"] and source["weight"] < 1:
            raise DataError(
                f"data.train: {source['source']} has weight {source['weight']:g} and "
                f"{source['kept']} usable pairs, which makes no training pair; raise the weight"
            )
