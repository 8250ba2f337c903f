"""The counts of a preparation, and the lines that say them to the user."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orpo_ray.config.data import Source
from orpo_ray.data.checks import (
    DROPPED,
    OVERLONG,
    OVERLONG_EITHER,
    OVERLONG_PAIR,
    OVERLONG_PROMPT,
    REASONS,
    SMALL_MARGIN,
)
from orpo_ray.data.rows import some_of
from orpo_ray.data.select import Selection
from orpo_ray.data.store import SIDES, Artifact, Summary

_BINS = 24
"""Bars of the histogram of lengths."""


def summarise(
    rows: pa.Table,
    selection: Selection,
    origins: Sequence[tuple[Source, str, str]],
    *,
    held_out: bool,
    digest: str,
    settings: dict[str, Any],
) -> Summary:
    """Count processed rows by what became of them.

    `origins` has source, label and split by the number of the source.
    """
    codes, sources = rows["code"].to_pylist(), rows["source"].to_numpy()
    is_row = rows["nth"].to_numpy() == 0
    counts = _count_by_source(codes, sources, is_row, selection)
    bad = Counter(code for code in codes if code and code not in DROPPED)
    kept = rows.take(pa.array(selection.kept))
    ignored = Counter(pc.list_flatten(kept["ignored"]).to_pylist())
    unused = _unused_by_source(rows)
    return Summary(
        hash=digest,
        settings=settings,
        sources=[
            {
                **source.model_dump(mode="json"),
                "name": label,
                "used_for": split,
                **{what: count[number] for what, count in counts.items()},
                "unused": dict(unused.get(number, {})),
            }
            for number, (source, label, split) in enumerate(origins)
        ],
        read=int(is_row.sum()),
        train=len(selection.train),
        eval=len(selection.eval),
        bad=dict(bad.most_common()),
        overlong=sum(code in OVERLONG for code in codes),
        overlong_prompts=codes.count(OVERLONG_PROMPT),
        small_margin=codes.count(SMALL_MARGIN),
        truncated=pc.sum(kept["truncated"]).as_py() or 0,
        duplicates=len(selection.duplicates),
        near=len(selection.near),
        good_answers=_count_empty(kept["rejected"]),
        bad_answers=_count_empty(kept["chosen"]),
        overlap=selection.overlap,
        multi_turn=pc.sum(kept["multi_turn"]).as_py() or 0,
        held_out=held_out,
        ignored=dict(ignored.most_common()),
    )


def _count_empty(lengths: pa.ChunkedArray) -> int:
    return int(np.count_nonzero(lengths.to_numpy() == 0))


def _count_by_source(
    codes: Sequence[str],
    sources: npt.NDArray[np.int32],
    is_row: npt.NDArray[np.bool_],
    selection: Selection,
) -> dict[str, Counter[int]]:
    """What became of rows and pairs, each counted by the number of their source."""
    coded = list(zip(sources.tolist(), codes, strict=True))
    return {
        "read": Counter(sources[is_row].tolist()),
        "kept": Counter(sources[selection.kept].tolist()),
        "duplicates": Counter(sources[selection.duplicates].tolist()),
        "overlong": Counter(number for number, code in coded if code in OVERLONG),
        "bad": Counter(number for number, code in coded if code and code not in DROPPED),
    }


def _unused_by_source(rows: pa.Table) -> dict[int, Counter[str]]:
    """How many rows of a source have each column that no pair is read from."""
    blocks = rows.select(["source", "unused"]).filter(pc.is_valid(rows["unused"])).to_pylist()
    found: dict[int, Counter[str]] = {}
    for block in blocks:
        found.setdefault(block["source"], Counter()).update(json.loads(block["unused"]))
    return found


def account(artifact: Artifact) -> dict[str, Any]:
    """What became of the rows, for run.json: counts, drops with reasons, sources, lengths.

    `lengths` counts the training pairs by the tokens of each side, between the `edges`.
    """
    summary = artifact.summary
    return {
        "hash": summary.hash,
        "read": summary.read,
        "train": summary.train,
        "eval": summary.eval,
        "dropped": _dropped(summary),
        "sources": [
            {name: source[name] for name in ("name", "used_for", "read", "kept")}
            for source in summary.sources
        ],
        "lengths": _histogram(artifact.train.lengths),
    }


def _dropped(summary: Summary) -> list[list[Any]]:
    """Why rows or pairs were dropped, and how many."""
    overlong = {
        OVERLONG_PAIR: f"longer than data.max_length={summary.settings.get('max_length')}",
        OVERLONG_PROMPT: "the prompt is longer than data.max_prompt_length="
        f"{summary.settings.get('max_prompt_length')}",
        OVERLONG_EITHER: "too long",
    }
    near = summary.near if summary.settings.get("dedup") == "near" else 0
    found = [
        *((REASONS[code], count) for code, count in summary.bad.items()),
        *((overlong[code], count) for code, count in summary.overlong_by_code().items()),
        ("exact duplicates", summary.duplicates),
        ("nearly equal to a held-out pair", near),
        ("scores differ by less than data.min_margin", summary.small_margin),
    ]
    return [[why, count] for why, count in found if count]


def _histogram(lengths: npt.NDArray[np.int64]) -> dict[str, Any]:
    width = max(1, -(-int(lengths.max(initial=0) + 1) // _BINS))
    edges = np.arange(_BINS + 1) * width
    sides = {
        name: np.histogram(lengths[:, column], bins=edges)[0].tolist()
        for column, name in enumerate(SIDES)
    }
    return {"edges": edges.tolist(), "sides": sides}


def describe_unused(summary: Summary, told: Mapping[str, Sequence[str]]) -> list[str]:
    """One line for each file or dataset with unused columns that are not in `told`."""
    found: dict[str, Counter[str]] = {}
    for source in summary.sources:
        # A file that is trained and evaluated on has the same rows twice.
        unused: Counter[str] = Counter(source["unused"])
        found[source["source"]] = found.get(source["source"], unused) | unused
    lines = []
    for name, counts in found.items():
        later = [
            f"{column} ({_count(count, 'row')})"
            for column, count in counts.items()
            if column not in told.get(name, ())
        ]
        if later:
            lines.append(f"{name}: columns of later rows that are not used: {some_of(later)}")
    return lines


def describe(summary: Summary) -> list[str]:
    """What a user should know about prepared data, one fact a line."""
    weighted = any(source["weight"] != 1 for source in summary.sources)
    lines = [
        f"{_count(summary.train, 'training pair')} and {_count(summary.eval, 'evaluation pair')} "
        f"from {_count(summary.read, 'row')}"
        + (" (training pairs counted by weight)" if weighted else "")
    ]
    if summary.good_answers or summary.bad_answers:
        lines.append(
            f"{summary.good_answers + summary.bad_answers} of them have one answer: "
            f"{summary.good_answers} good, {summary.bad_answers} bad"
        )
    lines += [
        f"{_count(count, 'bad row')} in quarantine.jsonl: {REASONS[code]}"
        for code, count in summary.bad.items()
    ]
    if summary.duplicates:
        lines.append(f"{_count(summary.duplicates, 'exact duplicate')} dropped")
    lines += _describe_near(summary)
    lines += _describe_overlong(summary)
    if summary.small_margin:
        margin = summary.settings["min_margin"]
        lines.append(
            f"{_count(summary.small_margin, 'row')} dropped: no two of their scored answers differ "
            f"by data.min_margin={margin:g}"
        )
    if summary.truncated:
        lines.append(f"{_count(summary.truncated, 'prompt')} cut on the left to fit")
    if summary.multi_turn:
        trained = "only the last answer is trained"
        if summary.settings.get("train_on") == "all-assistant":
            trained = "all are trained, those of the prompt by the likelihood term alone"
        lines.append(
            f"{_count(summary.multi_turn, 'pair')} with earlier assistant turns: {trained}"
        )
    lines += [
        f"{_count(count, 'pair')} with {name}, which this chat template does not write"
        for name, count in summary.ignored.items()
    ]
    return lines + _describe_evaluation(summary)


def _describe_near(summary: Summary) -> list[str]:
    if not summary.near:
        return []
    pairs = _count(summary.near, "training pair")
    if summary.settings["dedup"] == "near":
        return [f"{pairs} dropped: equal or nearly equal to an evaluation pair"]
    return [
        f"{pairs} nearly equal to an evaluation pair: evaluation will look better than it is; "
        "data.dedup=near drops them"
    ]


def _describe_overlong(summary: Summary) -> list[str]:
    """One line for each limit, since the user raises one or the other."""
    pair = f"data.max_length={summary.settings['max_length']}"
    prompt = f"data.max_prompt_length={summary.settings['max_prompt_length']}"
    exceeded = {
        OVERLONG_PAIR: f"the prompt and the longer of its two answers have more tokens than {pair}",
        OVERLONG_PROMPT: f"the prompt has more tokens than {prompt} (half of max_length, unless "
        "set)",
        OVERLONG_EITHER: f"they have more tokens than {pair}, or their prompts more than {prompt}",
    }
    return [
        f"{_count(count, 'pair')} dropped: {exceeded[code]}"
        for code, count in summary.overlong_by_code().items()
    ]


def _describe_evaluation(summary: Summary) -> list[str]:
    if summary.overlap:
        return [
            f"warning: {_count(summary.overlap, 'pair')} in both train and eval, so evaluation "
            "will look better than it is"
        ]
    if not summary.held_out:
        return []
    if not summary.eval:
        return [
            "no data.eval, and all pairs have the same prompt: nothing is held out for evaluation"
        ]
    return [
        f"no data.eval: {_count(summary.eval, 'training pair')} held out for evaluation (drawn by "
        "the seed; pairs of one prompt stay together)"
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
