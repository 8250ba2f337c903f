"""The whole of `judge`: what is left to ask, the verdicts that are kept, and the win rate."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from orpo_ray.errors import RunError
from orpo_ray.evaluation.answer_formats import line_of
from orpo_ray.evaluation.answers_file import AnswersFile
from orpo_ray.evaluation.judge.answers import Comparison, Sides
from orpo_ray.evaluation.judge.asking import TIE
from orpo_ray.evaluation.judge.tally import Points, Tally, length_controlled, tally, win_rate
from orpo_ray.runs.console import Console
from orpo_ray.runs.results import WinRate

Row = dict[str, Any]
_TELL_EVERY = 100


class Place(NamedTuple):
    """A question to a judge: a row, and whose answer comes first; None if there is no order."""

    row: int
    order: str | None


@dataclass(frozen=True)
class Left:
    """What is left to judge, and the requests that earlier commands made for the same file."""

    rows: Sequence[Comparison]
    places: Sequence[Place]
    requests: int


class Judge(Protocol):
    """Who compares answers."""

    @property
    def name(self) -> str:
        """What the judge is called."""

    @property
    def orders(self) -> Sequence[str | None]:
        """The orders in which it judges each row."""

    @property
    def settings(self) -> Row:
        """All that shapes its verdicts besides the answers."""

    def verdicts(self, left: Left, said: Console) -> Iterator[Row]:
        """Verdicts as they come, in any order of places.

        Each has `row`, `order`, `winner` ("A", "B", "tie" or "unreadable"), `text` (what the judge
        said) and `requests`. One without a winner says only that requests were made. Raises
        StoppedError if `said` asks to stop, after all that is there was given.
        """


def write_verdicts(out: Path, sides: Sides, judge: Judge, said: Console) -> WinRate:
    """Judge all rows, or go on where an earlier command was ended.

    Raises ConfigError for a file that cannot be written or that other settings began, RunError if
    no verdict can be read, and what the judge raises.
    """
    found, requests = _collect(out, sides, judge, said)
    return _result(out, sides, judge, found, requests)


def points_of_rows(out: Path, sides: Sides, judge: Judge, said: Console) -> Points:
    """What each row brings A, [rows]: 1, 0.5 or 0, and NaN if no verdict on it can be read.

    The verdicts are written as by `write_verdicts`, with the same errors but RunError.
    """
    found, _ = _collect(out, sides, judge, said)
    return _tally(sides, judge, found).points


def _collect(out: Path, sides: Sides, judge: Judge, said: Console) -> tuple[dict[Place, Row], int]:
    """All verdicts, which are in the file then, and the number of requests that they took."""
    file = AnswersFile(out)
    with file.held():
        settings = {**sides.settings, **judge.settings}
        kept = file.begin(settings)
        file.keep(settings, kept)
        found = {_place(row): row for row in kept if _is_verdict(row)}
        if kept:
            said.announce(f"going on after {len(found)} verdicts")
        left = _left(sides.rows, judge, kept, set(found))
        total = len(found) + len(left.places)
        for row in judge.verdicts(left, said):
            file.add([row])
            kept.append(row)
            if _is_verdict(row):
                found[_place(row)] = row
                if len(found) % _TELL_EVERY == 0:
                    said.announce(f"{len(found)} of {total} verdicts")
        file.finish(map(line_of, _lines(sides.rows, judge, found)))
    return found, sum(row["requests"] for row in kept)


def _place(row: Row) -> Place:
    return Place(row["row"], row["order"])


def _is_verdict(row: Row) -> bool:
    return "winner" in row


def _left(
    rows: Sequence[Comparison], judge: Judge, kept: Sequence[Row], done: Collection[Place]
) -> Left:
    """The places without a verdict. Identical answers are ties, and nobody is asked."""
    places = [
        Place(number, order)
        for number, row in enumerate(rows)
        if not row.is_identical
        for order in judge.orders
    ]
    left = [place for place in places if place not in done]
    return Left(rows, left, sum(row["requests"] for row in kept))


def _lines(
    rows: Sequence[Comparison], judge: Judge, found: Mapping[Place, Row]
) -> Iterator[dict[str, Any]]:
    """The lines of the file, in the order of the rows: one for each verdict."""
    for number, row in enumerate(rows):
        shown = {"prompt": row.a.messages[-1]["content"], "judge": judge.name}
        if row.is_identical:
            tie = {"order": None, "winner": TIE, "text": "identical answers"}
            yield {"row": number + 1, **shown, **tie}
            continue
        for order in judge.orders:
            verdict = dict(found[Place(number, order)])
            del verdict["requests"]  # how often it took to get it shapes nothing
            yield {**verdict, "row": number + 1, **shown}


def _tally(sides: Sides, judge: Judge, found: Mapping[Place, Row]) -> Tally:
    return tally(
        [
            [TIE]
            if row.is_identical
            else [found[Place(number, order)]["winner"] for order in judge.orders]
            for number, row in enumerate(sides.rows)
        ]
    )


def _result(
    out: Path, sides: Sides, judge: Judge, found: Mapping[Place, Row], requests: int
) -> WinRate:
    rows, counts = sides.rows, _tally(sides, judge, found)
    lengths = np.array([[len(row.a.answer), len(row.b.answer)] for row in rows], dtype=np.float64)
    readable = ~np.isnan(counts.points)
    if not readable.any():
        raise RunError(f"no verdict of {judge.name} can be read; see what it said in {out}")
    points, longer = counts.points[readable], (lengths[:, 0] - lengths[:, 1])[readable]
    raw, controlled = win_rate(points), length_controlled(points, longer)
    return WinRate(
        a=sides.a,
        b=sides.b,
        judge=judge.name,
        file=str(out),
        rows=len(rows),
        identical=sum(row.is_identical for row in rows),
        wins=counts.wins,
        losses=counts.losses,
        ties=counts.ties,
        disagreements=counts.disagreements,
        unreadable=counts.unreadable,
        win_rate=raw.value,
        low=raw.low,
        high=raw.high,
        length_controlled=controlled.value,
        length_controlled_low=controlled.low,
        length_controlled_high=controlled.high,
        a_length=float(lengths[:, 0].mean()),
        b_length=float(lengths[:, 1].mean()),
        requests=requests,
    )
