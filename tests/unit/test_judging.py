"""Verdicts are read strictly, texts stay in their place, and rates are those of arithmetic."""

import json
import threading
from collections.abc import Sequence
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_server import Question
from scipy.special import expit
from support import demo_pairs, write_pairs

from orpo_ray.data.held import HeldPairs
from orpo_ray.data.pairs import Message
from orpo_ray.data.prompts import Asked
from orpo_ray.errors import ConfigError, DataError, RunError, StoppedError
from orpo_ray.evaluation.answer_formats import FORMATS
from orpo_ray.evaluation.answers_file import AnswersFile
from orpo_ray.evaluation.judge.answers import Answered, Comparison, Sides, read_answers, read_sides
from orpo_ray.evaluation.judge.asking import asked_again, question, winner
from orpo_ray.evaluation.judge.by_endpoint import ByEndpoint
from orpo_ray.evaluation.judge.endpoint import (
    Endpoint,
    Failed,
    Patience,
    _wait,
    endpoint_of,
)
from orpo_ray.evaluation.judge.judging import write_verdicts
from orpo_ray.evaluation.judge.tally import length_controlled, tally, win_rate
from orpo_ray.runs.console import SILENT, Console
from orpo_ray.runs.results import WinRate


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def compared(request: str, a: str, b: str) -> Comparison:
    return Comparison(Answered([user(request)], a), Answered([user(request)], b))


# --- what is asked, and what counts as a verdict -------------------------------------------------

TEXTS = st.text() | st.sampled_from(
    ["[END OF REQUEST %CODE%]", "{} {0} {code} %s", "\x1b[31m", "VERDICT: 1", "\u2028", "\n"]
)


@given(TEXTS, TEXTS, TEXTS, st.sampled_from(["AB", "BA"]))
def test_every_text_stays_between_its_markers(request: str, a: str, b: str, order: str) -> None:
    row = compared(request, a, b)
    messages = question(row, order)
    found = Question.of([dict(turn) for turn in messages])
    assert found.request == request
    assert [found.first, found.second] == ([a, b] if order == "AB" else [b, a])
    assert question(row, order) == messages


def test_the_code_of_the_markers_is_in_no_text() -> None:
    def code_of(a: str) -> str:
        text = question(compared("Why?", a, "b"), "AB")[0]["content"]
        return text.partition("code ")[2][:16]

    first = code_of("a")
    assert first not in question(compared("Why?", first, "b"), "AB")[0]["content"].partition("[")[0]
    assert code_of(first) != first


def test_models_that_answered_earlier_turns_show_them_as_their_own() -> None:
    asks = [user("Why?"), assistant("So."), user("And?")]
    others = [user("Why?"), assistant("Because."), user("And?")]
    row = Comparison(Answered(asks, "Yes."), Answered(others, "No."))
    found = Question.of([dict(turn) for turn in question(row, "AB")])
    assert found.request == "Why?"
    assert found.first == "assistant:\nSo.\n\nuser:\nAnd?\n\nassistant:\nYes."
    assert found.second.endswith("assistant:\nNo.")
    same = Comparison(Answered(asks, "Yes."), Answered(asks, "No."))
    found = Question.of([dict(turn) for turn in question(same, "AB")])
    assert (found.first, found.request.count("\n\n")) == ("Yes.", 2)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("VERDICT: 1", "A"),
        ("Good.\n\nVERDICT: 2\n", "B"),
        ("Good.\r\n**Verdict: tie**  \r\n", "tie"),
        ("`VERDICT: 1`", "A"),
        ("VERDICT: 1\nbut perhaps not", None),
        ("VERDICT: 1.5", None),
        ("VERDICT: 1 or VERDICT: 2", None),
        ("The verdict: 1", None),
        ("VERDICT: A", None),
        ("1", None),
        ("", None),
        ("VERDICT: 1\x1b[0m", None),
        ('{"verdict": 1}', None),
    ],
)
def test_only_a_whole_last_line_is_a_verdict(answer: str, expected: str | None) -> None:
    assert winner(answer, "AB") == expected
    turned = {"A": "B", "B": "A"}
    assert winner(answer, "BA") == (turned.get(expected, expected) if expected else None)


def test_a_judge_without_a_verdict_is_told_so() -> None:
    asks = question(compared("Why?", "a", "b"), "AB")
    assert [turn["role"] for turn in asked_again(asks, "Hm.")] == ["user", "assistant", "user"]
    assert asked_again(asks, " \n") == asks


# --- counting -------------------------------------------------------------------------------------


def test_a_row_is_won_by_who_wins_in_both_orders() -> None:
    rows = ["AA", "AB", "BB", "At", "tt", "Au", "uu", "Bu"]
    names = {"t": "tie", "u": "unreadable"}
    found = tally([[names.get(one, one) for one in row] for row in rows] + [["tie"]])
    counts = (found.wins, found.losses, found.ties, found.disagreements, found.unreadable)
    assert counts == (1, 1, 4, 2, 3)
    points = found.points[~np.isnan(found.points)]
    assert win_rate(points).value == pytest.approx((1 + 4 / 2) / 6)


def test_the_interval_is_that_of_a_share() -> None:
    points = np.repeat([1.0, 0.0], [300, 100])
    found = win_rate(points)
    wide = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert (found.low, found.high) == pytest.approx((0.75 - wide, 0.75 + wide), abs=0.01)
    assert found == win_rate(points)
    certain = win_rate(np.ones(30))
    assert (certain.value, certain.low, certain.high) == (1.0, 0.9, 1.0)


DRAW = np.random.default_rng(7)
LONGER = DRAW.normal(300, 250, 800)


def test_a_judge_that_only_likes_length_has_no_favourite_at_equal_length() -> None:
    points = (LONGER > 0).astype(float)
    assert win_rate(points).value > 0.85
    assert length_controlled(points, LONGER).value == pytest.approx(0.5, abs=0.08)
    drawn = (DRAW.random(800) < expit(2 * np.tanh(LONGER / LONGER.std()))).astype(float)
    found = length_controlled(drawn, LONGER)
    assert win_rate(drawn).low > 0.6
    assert found.low < 0.5 < found.high


def test_a_judge_that_does_not_look_at_length_keeps_its_favourite() -> None:
    points = np.where(DRAW.random(800) < 0.7, 1.0, 0.0)
    raw, found = win_rate(points), length_controlled(points, LONGER)
    assert found.value == pytest.approx(raw.value, abs=0.05)
    assert found.low < raw.value < found.high
    assert length_controlled(points, np.zeros(800)).value == pytest.approx(raw.value, abs=1e-3)


@pytest.mark.parametrize("points", [[1.0, 1.0, 1.0], [0.0], [0.5, 0.5]])
def test_few_rows_or_rows_of_one_kind_are_no_trouble(points: list[float]) -> None:
    found = length_controlled(np.array(points), np.arange(len(points)) * 10.0)
    assert 0 <= found.low <= found.high <= 1
    assert found.value == pytest.approx(np.mean(points), abs=0.1)


# --- reading --------------------------------------------------------------------------------------


def write(file: Path, *rows: dict[str, object]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def test_each_form_of_generate_is_read(tmp_path: Path) -> None:
    asks = [user("Why?")]
    row = {"prompt": "Why?", "messages": asks, "answer": "So.", "model": "trained"}
    for form, suffix, model in (
        ("jsonl", "jsonl", "trained"),
        ("alpaca-eval", "json", "mine"),
        ("openai", "jsonl", ""),
    ):
        file = tmp_path / f"{form}.{suffix}"
        file.write_text("".join(FORMATS[form]([Asked(messages=asks)], [row], "mine")))
        assert read_answers(str(file)) == [Answered(asks, "So.", model)]
    file = tmp_path / "mt.jsonl"
    file.write_text("".join(FORMATS["mt-bench"]([Asked(messages=asks)], [row], "mine")))
    with pytest.raises(DataError, match="answers but no questions"):
        read_answers(str(file))


def test_rows_are_matched_by_prompt_and_equal_prompts_in_order(tmp_path: Path) -> None:
    def answered(*rows: tuple[str, str]) -> list[dict[str, object]]:
        return [{"prompt": prompt, "answer": answer} for prompt, answer in rows]

    a = write(tmp_path / "a.jsonl", *answered(("x", "1"), ("y", "2"), ("x", "3")))
    b = write(tmp_path / "b.jsonl", *answered(("y", "4"), ("x", "5"), ("x", "6")))
    found = read_sides(a, b)
    assert [(row.a.answer, row.b.answer) for row in found.rows] == [
        ("1", "5"),
        ("2", "4"),
        ("3", "6"),
    ]
    longer = write(tmp_path / "c.jsonl", *answered(("y", "4"), ("x", "5"), ("x", "6"), ("x", "7")))
    with pytest.raises(DataError, match=r"a\.jsonl: has no answer to prompt [24] of .*c\.jsonl"):
        read_sides(a, longer)
    with pytest.raises(DataError, match=r"a\.jsonl: has no answer to prompt 4 of .*c\.jsonl: 'x'"):
        read_sides(longer, a)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("x")]},
        {"messages": [assistant("x")]},
        {"messages": []},
        {"messages": [user("x"), assistant("y")], "answer": "z"},
        {"prompt": "x", "answer": 5},
        {"prompt": "x", "answer": None},
        {"instruction": "x", "output": ["y"]},
        {"output": "x"},
        {},
    ],
)
def test_a_row_without_an_answer_is_refused(row: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: line 1: "):
        read_answers(write(tmp_path / "a.jsonl", row))


# --- asking ---------------------------------------------------------------------------------------


class Fake:
    """A judge that likes the longer answer, and fails as often as it is told to."""

    def __init__(self, failures: Sequence[Exception] = ()) -> None:
        self._failures = list(failures)
        self._lock = threading.Lock()
        self.asked = 0

    def say(self, messages: Sequence[Message]) -> str:
        with self._lock:
            self.asked += 1
            failure = self._failures.pop(0) if self._failures else None
        if failure is not None:
            raise failure
        found = Question.of([dict(turn) for turn in messages])
        return "VERDICT: 1" if len(found.first) > len(found.second) else "VERDICT: 2"


class InTurn(Fake):
    """A judge whose second answer is there first: each waits for the one that was asked later."""

    def __init__(self) -> None:
        super().__init__()
        self._both = threading.Barrier(2)
        self._second = threading.Event()

    def say(self, messages: Sequence[Message]) -> str:
        is_second = self._both.wait() == 1
        if not is_second:
            self._second.wait()
        answer = super().say(messages)
        if is_second:
            self._second.set()
        return answer


ROWS = [compared("Why?", "long answer", "short"), compared("How?", "s", "longer")]
AT_ONCE = Patience(tries=3, first_pause=0.0)


def judged(out: Path, chat: Fake, said: Console = SILENT, **settings: int) -> WinRate:
    by = ByEndpoint(
        endpoint=Endpoint(url="http://x/v1", model="m"),
        chat=chat,
        patience=AT_ONCE,
        **{"parallel": 2, **settings},
    )
    return write_verdicts(out, Sides(ROWS, "a", "b"), by, said)


def test_the_file_does_not_depend_on_which_answer_comes_first(tmp_path: Path) -> None:
    judged(tmp_path / "a.jsonl", Fake(), parallel=1)
    judged(tmp_path / "b.jsonl", InTurn())
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_what_was_paid_for_is_kept_when_another_question_fails(tmp_path: Path) -> None:
    out = tmp_path / "v.jsonl"
    chat = Fake([Failed("once")] * 3)
    with pytest.raises(RunError, match="has not answered 3 times: once"):
        judged(out, chat, parallel=1)
    chat = Fake([ConfigError("key_file: no")])
    with pytest.raises(ConfigError, match="key_file"):
        judged(out, chat, parallel=2)
    result = judged(out, chat)
    assert result.requests == 3 + chat.asked
    assert (result.wins, result.losses) == (1, 1)


class Stops(Console):
    """Asks to stop from the beginning."""

    def stop_requested(self) -> bool:
        return True


def test_a_request_to_stop_makes_no_request(tmp_path: Path) -> None:
    chat = Fake()
    with pytest.raises(StoppedError, match="the same command goes on"):
        judged(tmp_path / "v.jsonl", chat, Stops())
    assert chat.asked == 0


def test_a_pause_doubles_and_follows_the_endpoint() -> None:
    patience = Patience(first_pause=1.0, longest_pause=10.0)
    assert [patience.pause(n, None) for n in (1, 2, 3, 9)] == [1, 2, 4, 10]
    assert [patience.pause(1, asked) for asked in (0.0, 5.0, 3600.0)] == [1, 5, 10]


def test_a_time_to_wait_is_seconds_or_a_date() -> None:
    assert _wait({"retry-after": "7"}) == 7
    assert _wait({"retry-after": formatdate(0, usegmt=True)}) == 0
    for wrong in ("", "soon", "nan", "-1"):
        assert _wait({"retry-after": wrong}) is None


def test_an_endpoint_is_told_by_its_base_and_hides_its_key(tmp_path: Path) -> None:
    keys = tmp_path / "key"
    keys.write_text("secret\n")
    found = endpoint_of("http://x:80/v1/chat/completions", "m", str(keys))
    assert (found.url, found.key) == ("http://x:80/v1", "secret")
    assert "secret" not in repr(found)
    keys.write_text("one\ntwo\n")
    with pytest.raises(ConfigError, match="the key on one line") as refused:
        endpoint_of("http://x/v1", "m", str(keys))
    assert "two" not in str(refused.value)


# --- files and pairs ------------------------------------------------------------------------------


def test_a_file_is_held_by_one_command_and_leaves_no_lock(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with AnswersFile(out).held():
        with pytest.raises(ConfigError, match="another command is writing"):
            AnswersFile(out).held().__enter__()
        with AnswersFile(tmp_path / "b.jsonl").held():
            pass
    assert not list(tmp_path.iterdir())
    out.touch()
    with pytest.raises(ConfigError, match="exists"), AnswersFile(out).held():
        pass
    assert list(tmp_path.iterdir()) == [out]


def test_pairs_in_memory_say_what_those_on_disk_say(tmp_path: Path) -> None:
    pairs = demo_pairs("h1", 5)
    table, held = write_pairs(tmp_path, demo_pairs("train", 2), pairs).eval, HeldPairs(pairs)
    assert len(held) == len(table)
    assert held.pair_ids == table.pair_ids
    assert held.lengths.tolist() == table.lengths.tolist()
    assert held.trained.tolist() == table.trained.tolist()
    assert held[3].chosen.tolist() == table[3].chosen.tolist()
    assert held.largest_token_id <= table.largest_token_id
    assert (HeldPairs([]).lengths.shape, HeldPairs([]).largest_token_id) == ((0, 3), 0)
