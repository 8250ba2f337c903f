"""A judge's wins are those of its verdicts, are asked for once, and may be missing."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Listener, run_config

from orpo_ray.errors import RunError, StoppedError
from orpo_ray.evaluation.judge.judging import Left, Row
from orpo_ray.runs.console import Console
from orpo_ray.runs.run import Run
from orpo_ray.search.greedy import Questions, Said, Told
from orpo_ray.search.judged import judged, sides_of
from orpo_ray.search.standings import figures_of_answers, spread_of_answers

ASKED = Questions(
    numbers=(0, 1, 2, 3),
    prompts=("Who?", "Why?", "When?", "Where?"),
    chosen=("",) * 4,
    rejected=("",) * 4,
    words=frozenset(),
    max_new_tokens=8,
)
BASE = [Said(text, False) for text in ("me", "so", "now", "here")]
OURS = [Said(text, False) for text in ("myself", "s", "now", "???")]
WORDS = Told(broken=0.25, wins=(0.0,) * 4, why={})


@dataclass
class ByLength:
    """A judge that likes long answers and cannot read question marks."""

    name: str = "by-length"
    fails_after: int | None = None
    asked: list[int] = field(default_factory=list)
    orders: Sequence[str | None] = (None,)

    @property
    def settings(self) -> Row:
        return {"judge": self.name}

    def verdicts(self, left: Left, said: Console) -> Iterator[Row]:
        for place in left.places:
            if self.fails_after is not None and len(self.asked) == self.fails_after:
                raise RunError("nobody answers")
            self.asked.append(place.row)
            row = left.rows[place.row]
            winner = "A" if len(row.a.answer) > len(row.b.answer) else "B"
            found = "unreadable" if "?" in row.a.answer else winner
            yield {**place._asdict(), "winner": found, "text": "", "requests": 1}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(run_config(tmp_path))
    made.folder.mkdir(parents=True)
    return made


def by(judge: ByLength, run: Run, said: Console, ours: Sequence[Said] = OURS) -> Told:
    return judged(WORDS, sides_of(ASKED, ours, BASE, "run"), judge, run, said)


def test_wins_are_those_of_the_verdicts_and_are_asked_for_once(run: Run) -> None:
    judge = ByLength()
    for _ in range(2):
        found = by(judge, run, Listener())
        assert found.wins[:3] == (1.0, 0.0, 0.5), "the same answer twice is a tie"
        assert np.isnan(found.wins[3]) and found.broken == WORDS.broken
    assert judge.asked == [0, 1, 3]


def test_other_answers_and_another_judge_are_asked_for_again(run: Run) -> None:
    by(ByLength(), run, Listener())
    other, again = ByLength("another"), ByLength()
    by(other, run, Listener())
    assert other.asked == [0, 1, 3]
    assert by(again, run, Listener(), BASE).wins == (0.5,) * 4
    assert again.asked == []


def test_a_judge_that_fails_gives_no_wins_and_keeps_its_verdicts(run: Run) -> None:
    said = Listener()
    assert by(ByLength(fails_after=2), run, said).wins == ()
    assert any("no wins by by-length: nobody answers" in line for line in said.said)
    again = ByLength()
    assert by(again, run, Listener()).wins[:3] == (1.0, 0.0, 0.5)
    assert again.asked == [3]


def test_a_stop_is_not_swallowed(run: Run) -> None:
    class Stops(ByLength):
        def verdicts(self, left: Left, said: Console) -> Iterator[Row]:
            raise StoppedError("stopped")
            yield {}

    with pytest.raises(StoppedError):
        by(Stops(), run, Listener())


def test_verdicts_are_beside_the_wins(run: Run) -> None:
    by(ByLength(), run, Listener())
    (file,) = run.folder.glob("judged-*.jsonl")
    rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(ASKED.prompts)
    assert not list(run.folder.glob("*.part"))


def test_a_rate_is_over_what_can_be_read() -> None:
    nan = float("nan")
    first, second = Told(0.0, (1.0, nan, 0.0, nan), {}), Told(0.5, (1.0, 1.0, 1.0, nan), {})
    found = figures_of_answers([first, second])
    assert found["win_rate"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert found["broken"] == pytest.approx(0.25)
    assert spread_of_answers([first, second])["win_rate"] == pytest.approx(0.5 / 2**0.5)
    assert 0 <= found["win_low"] <= found["win_rate"] <= found["win_high"] <= 1


@pytest.mark.parametrize("wins", [(), (float("nan"),)])
def test_no_verdict_is_no_rate(wins: tuple[float, ...]) -> None:
    assert figures_of_answers([Told(0.5, wins, {})]) == {
        "broken": 0.5,
        "broken_before": 0.0,
    }
    assert figures_of_answers([]) == spread_of_answers([Told(0.5, wins, {})] * 2) == {}
