"""Shows prepared pairs: which tokens are trained, their lengths, and what was dropped and why."""

import json
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orpo_ray.data.checks import REASONS, SMALL_MARGIN
from orpo_ray.data.pairs import IntArray, Ranges
from orpo_ray.data.store import SIDES, Artifact
from orpo_ray.training.plan import longer_side

_STYLES = {"prompt": "bright_black", "chosen": "green", "rejected": "red"}
_EARLIER = "cyan"
"""The style of earlier turns that are trained, which are in the prompt."""
_BINS = 10
_BAR = 40


def show_artifact(artifact: Artifact, tokenizer: Any, count: int, to_stderr: bool) -> None:
    """Print the first `count` pairs, the histogram of lengths and the table of dropped rows."""
    console = Console(stderr=to_stderr)
    legend = {
        "prompt, not trained": _STYLES["prompt"],
        "chosen, trained": _STYLES["chosen"],
        "rejected, trained": _STYLES["rejected"],
    }
    if artifact.summary.settings.get("train_on") == "all-assistant":
        legend = {"not trained": _STYLES["prompt"], "earlier turn, trained": _EARLIER, **legend}
        del legend["prompt, not trained"]
    console.print(Text("   ").join(Text(text, style=style) for text, style in legend.items()))
    for index in range(min(count, len(artifact.train))):
        pair = artifact.train[index]
        console.rule(pair.pair_id)
        for part in SIDES:
            ids, ranges = getattr(pair, part), getattr(pair.trained, part)
            if len(ids):  # a single answer has no other side
                console.print(Text(f"{part}: {count_tokens(ids, ranges)}", style="bold"))
                style = _EARLIER if part == "prompt" else _STYLES[part]
                console.print(colour_side(tokenizer, ids, ranges, style))
    console.print(length_histogram(artifact.train.lengths))
    console.print(dropped_rows(artifact))


def count_tokens(ids: IntArray, ranges: Ranges) -> str:
    """How many tokens a side has, and how many of them are trained if neither all are nor none."""
    trained = sum(stop - start for start, stop in ranges.tolist())
    some = f", {trained} of them trained" if 0 < trained < len(ids) else ""
    return f"{len(ids)} tokens{some}"


def colour_side(tokenizer: Any, ids: IntArray, ranges: Ranges, style: str) -> Text:
    """The text of one side. Its trained tokens have the style, the others that of a prompt."""
    text, end = Text(), 0
    for start, stop in [*ranges.tolist(), [len(ids), len(ids)]]:
        text.append_text(colour_tokens(tokenizer, ids[end:start].tolist(), _STYLES["prompt"]))
        text.append_text(colour_tokens(tokenizer, ids[start:stop].tolist(), style))
        end = stop
    return text


def colour_tokens(tokenizer: Any, ids: list[int], style: str) -> Text:
    """The text of token ids in one style. Special tokens have reversed colours."""
    special = set(tokenizer.all_special_ids)
    text = Text()
    for is_special, run in groupby(ids, key=special.__contains__):
        text.append(tokenizer.decode(list(run)), style=f"{style} reverse" if is_special else style)
    return text


def length_histogram(lengths: npt.NDArray[np.int64]) -> Table:
    """How long pairs are, in tokens of prompt and longer answer, from their lengths [n, 3]."""
    totals = longer_side(lengths)
    edges = np.unique(np.linspace(totals.min(), totals.max() + 1, _BINS + 1).astype(int))
    counts, _ = np.histogram(totals, bins=edges)
    table = Table(
        title="tokens of prompt and longer answer",
        title_justify="left",
        show_header=False,
        box=None,
    )
    for size, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * round(_BAR * size / counts.max())
        table.add_row(f"{low}-{high - 1}", str(size), bar)
    return table


def dropped_rows(artifact: Artifact) -> Table:
    """How many rows were dropped for each reason, and where the first of them is.

    Their texts are not shown.
    """
    summary = artifact.summary
    table = Table(title="dropped", title_justify="left", box=None)
    for column in ("rows", "reason", "first"):
        table.add_column(column, justify="right" if column == "rows" else "left", overflow="fold")
    with (artifact.path / "quarantine.jsonl").open(encoding="utf-8") as file:
        first = _first_of_each_reason(json.loads(line) for line in file)
    for code, count in summary.bad.items():
        table.add_row(str(count), REASONS[code], first.get(code, ""))
    if summary.duplicates:
        table.add_row(str(summary.duplicates), "exact duplicates", "")
    if summary.small_margin:
        table.add_row(str(summary.small_margin), REASONS[SMALL_MARGIN], "")
    if summary.near and summary.settings["dedup"] == "near":
        table.add_row(str(summary.near), "nearly equal to an evaluation pair", "")
    for code, count in summary.overlong_by_code().items():
        table.add_row(str(count), REASONS[code], "")
    if not table.row_count:
        table.add_row("0", "nothing was dropped", "")
    return table


def _first_of_each_reason(rows: Iterable[dict[str, Any]]) -> dict[str, str]:
    first: dict[str, str] = {}
    for row in rows:
        first.setdefault(row["reason"], f"{row['file'].rsplit('/')[-1]}:{row['line']}")
    return first
