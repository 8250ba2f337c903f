"""Which prompts are answered together, and a file of answers that any process can go on with."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from orpo_ray.data.prompts import Asked, prompt_of
from orpo_ray.errors import ConfigError
from orpo_ray.evaluation.answer_formats import FORMATS
from orpo_ray.evaluation.answerer import Answerer, Work
from orpo_ray.evaluation.answers_file import AnswersFile
from orpo_ray.evaluation.batches import Batch, in_order, plan_batches, whole_windows
from orpo_ray.evaluation.orders import order_of
from orpo_ray.training.generate import Answer, Listener, Speaker
from orpo_ray.training.sampling import Room, Sampling
from tests.support import BASE, decided, run_config

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=200)


@given(LENGTHS, st.integers(1, 100), st.integers(1, 2000), st.integers(50, 400))
def test_batches_hold_every_prompt_once_within_the_budget(
    lengths: list[int], new_tokens: int, budget: int, positions: int
) -> None:
    plan = plan_batches(lengths, ["base", "trained"], Room(new_tokens, budget, positions))
    for who in ("base", "trained"):
        rows = [row for batch in plan if batch.model == who for row in batch.rows]
        assert sorted(rows) == list(range(len(lengths)))
    for batch in plan:
        widest = max(lengths[row] for row in batch.rows) + new_tokens
        assert len(batch.rows) == 1 or widest * len(batch.rows) <= budget
        assert len(batch.rows) == 1 or widest <= positions, "it cuts no other answer"
    assert [batch.number for batch in plan] == list(range(len(plan)))


@given(LENGTHS, st.randoms(use_true_random=False), st.data())
def test_answers_come_in_order_whatever_batch_is_done_first(
    lengths: list[int], draw, data: st.DataObject
) -> None:
    plan = plan_batches(lengths, ["base", "trained"], Room(10, 500))
    windows, kept = whole_windows(plan, data.draw(st.integers(0, 2 * len(lengths))))
    left = [batch for batch in plan if batch.window >= windows]
    answered = [(batch.number, [(batch.model, row) for row in batch.rows]) for batch in left]
    draw.shuffle(answered)
    found = [answer for rows in in_order(left, answered) for answer in rows]
    whole = [(who, row) for who in ("base", "trained") for row in range(len(lengths))]
    assert found == whole[kept:]


class Says(Speaker):
    """A model that gives one answer to everything, and keeps what it was asked."""

    def __init__(self, answer: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(BASE)
        self.says = Answer(answer, is_cut=False, tokens=5)
        self.asked: list[Sequence[int]] = []

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        listener: Listener | None = None,
    ) -> list[Answer]:
        self.asked += prompts
        return [self.says for _ in prompts]


@pytest.mark.parametrize("said", ["[INST] one </s>", "<|im_end|>\n<|im_start|>user\nMore?"])
def test_marks_in_a_first_answer_do_not_end_the_command(tmp_path: Path, said: str) -> None:
    speaker = Says(said)
    sampling = Sampling(max_new_tokens=8)
    work = Work(
        config=run_config(tmp_path),
        decisions=decided(512),
        trained=None,
        sampling=sampling,
        room=Room(8, 100),
        tokenizer="",
    )
    asked = Asked(messages=[{"role": "user", "content": "Why?"}], later=["And?"])
    batch = Batch(number=0, window=0, model="base", rows=(0,))
    [row] = Answerer(speaker, work, "base").answer([asked], batch)
    assert [turn["content"] for turn in row["messages"]] == ["Why?", said, "And?"]
    assert f"assistant\n{said}<|im_end|>\n" in speaker.tokenizer.decode(speaker.asked[-1])
    end = speaker.tokenizer.eos_token_id
    assert speaker.asked[-1].count(end) == 3, "the ends of the turns alone"


SETTINGS = {"prompts": "1", "seed": 0}


def test_a_file_goes_on_after_any_cut(tmp_path: Path) -> None:
    rows = [{"answer": "\u2028 line"}, {"answer": "b"}]
    whole = tmp_path / "whole.jsonl"
    file = AnswersFile(whole)
    assert file.begin(SETTINGS) == []
    file.keep(SETTINGS, [])
    file.add(rows)
    part = whole.with_name("whole.jsonl.part").read_bytes()
    for length in range(len(part) + 1):
        cut = tmp_path / "cut.jsonl"
        cut.with_name("cut.jsonl.part").write_bytes(part[:length])
        begun = AnswersFile(cut)
        kept = begun.begin(SETTINGS)
        assert kept == rows[: len(kept)]
        begun.keep(SETTINGS, kept)
        begun.add(rows[len(kept) :])
        assert cut.with_name("cut.jsonl.part").read_bytes() == part
    file.finish(["x\n"])
    assert whole.read_text() == "x\n"
    assert not whole.with_name("whole.jsonl.part").exists()


def test_a_file_of_other_settings_is_refused(tmp_path: Path) -> None:
    file = AnswersFile(tmp_path / "a.jsonl")
    file.keep(SETTINGS, [])
    with pytest.raises(ConfigError, match="begun with another seed; remove it"):
        file.begin({**SETTINGS, "seed": 1})


def test_a_part_that_is_no_such_file_is_refused(tmp_path: Path) -> None:
    for content in (b"\xff\n[1\n", b"5\n", b"null\n"):
        (tmp_path / "a.jsonl.part").write_bytes(content)
        with pytest.raises(ConfigError, match="is not what this command writes"):
            AnswersFile(tmp_path / "a.jsonl").begin(SETTINGS)
    (tmp_path / "b.jsonl.part").mkdir()
    with pytest.raises(ConfigError, match="directory"):
        AnswersFile(tmp_path / "b.jsonl").begin(SETTINGS)


def _answer(messages: list[dict[str, str]], answer: str) -> dict[str, object]:
    return {"prompt": messages[-1]["content"], "messages": messages, "answer": answer}


def _asked(row: dict[str, object]) -> Asked:
    found = prompt_of(row)
    assert isinstance(found, Asked)
    return found


def test_other_tools_read_their_forms() -> None:
    asks = [{"role": "user", "content": "Why?"}]
    row = {"dataset": "koala", "instruction": "Why?", "output": "old", "generator": "x"}
    (text,) = FORMATS["alpaca-eval"]([_asked(row)], [_answer(asks, "So.")], "mine")
    expected = {"dataset": "koala", "instruction": "Why?", "output": "So.", "generator": "mine"}
    assert json.loads(text) == [expected]
    (line,) = FORMATS["openai"]([_asked({"prompt": "Why?"})], [_answer(asks, "So.")], "mine")
    assert json.loads(line) == {"messages": [*asks, {"role": "assistant", "content": "So."}]}
    question = _asked({"question_id": 81, "turns": ["Why?", "And?"]})
    said = [*asks, {"role": "assistant", "content": "A."}, {"role": "user", "content": "And?"}]
    (line,) = FORMATS["mt-bench"]([question], [_answer(said, "B.")], "mine")
    found = json.loads(line)
    assert found["choices"] == [{"index": 0, "turns": ["A.", "B."]}]
    assert (found["question_id"], found["model_id"]) == (81, "mine")


def test_a_column_that_is_no_utf_8_stays_an_escape() -> None:
    row = {"prompt": "Why?", "question_id": "\ud800", "dataset": "\ud800", "instruction": {"a": 1}}
    asks = [{"role": "user", "content": "Why?"}]
    for form in ("mt-bench", "alpaca-eval"):
        text = "".join(FORMATS[form]([Asked(messages=asks, row=row)], [_answer(asks, "So.")], "m"))
        assert text.encode("utf-8")
        assert "\ud800" in json.dumps(json.loads(text), ensure_ascii=False)
    assert json.loads(text)[0]["instruction"] == "Why?"


def test_a_form_has_the_keys_of_published_answers(shared_data: Path) -> None:
    with (shared_data / "mtbench_mistral_orpo_beta.jsonl").open() as file:
        published = json.loads(file.readline())
    question = _asked({"question_id": 81, "turns": ["Why?"]})
    asks = [{"role": "user", "content": "Why?"}]
    (line,) = FORMATS["mt-bench"]([question], [_answer(asks, "B.")], "mine")
    assert set(json.loads(line)) == set(published)
    assert set(json.loads(line)["choices"][0]) == set(published["choices"][0])


@pytest.mark.parametrize(
    ("form", "model", "tokens", "told"),
    [
        ("xml", "base", 1, "format: must be jsonl, alpaca-eval, mt-bench or openai, not xml"),
        ("jsonl", "mine", 1, "model: must be trained, base or both, not mine"),
        ("openai", "both", 1, "no place for a second model's answers"),
        ("jsonl", "base", 0, "batch_tokens: must be 1 or more"),
    ],
)
def test_an_order_for_what_there_is_not_is_refused(
    form: str, model: str, tokens: int, told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        order_of(tmp_path / "a.jsonl", form, model, tokens)


def test_a_file_is_not_written_over_nor_into_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ConfigError, match="exists; name another file"):
        order_of(tmp_path / "a.jsonl", "jsonl", "base", 1)
    with pytest.raises(ConfigError, match="no folder"):
        order_of(tmp_path / "x" / "a.jsonl", "jsonl", "base", 1)


@pytest.mark.parametrize(
    "numbers",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
    ],
)
def test_numbers_out_of_range_are_refused(numbers: dict[str, float]) -> None:
    (name,) = numbers
    with pytest.raises(ConfigError, match=name):
        Sampling(**{"max_new_tokens": 8, **numbers})
