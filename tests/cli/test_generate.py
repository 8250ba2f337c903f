"""`orpo-ray generate`: a file of answers, whatever ends the command in between."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from support import DEMO, wait_until
from terminal import STOPPED, WRONG, Command, Finished, one_line, start

import orpo_ray

PROMPTS = DEMO / "h1.jsonl"
SHORT = ("--max-new-tokens", "6")


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts as lines of text."""
    file = tmp_path_factory.mktemp("prompts") / "few.txt"
    file.write_text("What sound does a cow make?\nHello!\nName a colour.\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def whole(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers of base and trained model to all prompts, by a command that nothing ended."""
    out = tmp_path_factory.mktemp("whole") / "whole.jsonl"
    done = start(*_both(finished, out)).end()
    assert done.code == 0, done.err
    return out


def _both(finished: Finished, out: Path) -> list[object]:
    asks = ["generate", finished.run_dir, "--prompts", PROMPTS, "--out", out]
    return [*asks, *SHORT, "--model", "both"]


def test_answers_are_those_that_evaluate_shows(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    quiet = ("--max-new-tokens", "24", "--json")
    done = command("generate", finished.config, "--prompts", PROMPTS, "--out", out, *quiet)
    assert done.code == 0, done.err
    rows = rows_of(out)
    assert done.result == {
        "file": str(out),
        "model": "trained",
        "answers": len(rows),
        "cut": sum(row["stopped"] == "length" for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
    }
    shown = command("evaluate", finished.run_dir, "--samples", "8", *quiet).result["samples"]
    assert [row["answer"] for row in rows[:8]] == [sample["trained"] for sample in shown]
    cut = [sample["trained_is_cut"] for sample in shown]
    assert [row["stopped"] == "length" for row in rows[:8]] == cut
    asked = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    assert [row["messages"] for row in rows] == asked


def test_a_loaded_model_says_what_the_command_says(finished: Finished, whole: Path) -> None:
    model, tokenizer = orpo_ray.load(finished.run_dir)
    rows = [row for row in rows_of(whole) if row["model"] == "trained"]
    for row in rows[:4]:
        asked = tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        said = model.generate(**asked, max_new_tokens=6, do_sample=False)
        text = tokenizer.decode(said[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.strip() == row["answer"]
    with pytest.raises(orpo_ray.ConfigError, match="no run is there"):
        orpo_ray.load(finished.run_dir / "none")


def test_a_folder_names_the_run_in_python_too(
    finished: Finished, few: Path, tmp_path: Path
) -> None:
    config = orpo_ray.load_config(finished.config)
    files = [tmp_path / name for name in ("named", "given")]
    for run, out in zip((finished.run_dir, config), files, strict=True):
        assert orpo_ray.generate(run, few, out, max_new_tokens=4).answers == 3
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(orpo_ray.ConfigError, match="no run is there"):
        orpo_ray.generate(tmp_path / "none", few, tmp_path / "out")


def test_both_models_answer_one_after_the_other(whole: Path) -> None:
    rows = rows_of(whole)
    half = len(rows) // 2
    assert {row["model"] for row in rows[:half]} == {"base"}
    assert {row["model"] for row in rows[half:]} == {"trained"}
    assert [row["prompt"] for row in rows[:half]] == [row["prompt"] for row in rows[half:]]
    assert [row["answer"] for row in rows[:half]] != [row["answer"] for row in rows[half:]]


_WINDOW = 64
"""How many answers are computed before they are collected."""


def lines_of(part: Path) -> int:
    """How many lines a command has collected; none once it has ended."""
    try:
        return part.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("number", range(3))
def test_a_killed_command_goes_on_and_gives_the_same_file(
    number: int, finished: Finished, whole: Path, tmp_path: Path
) -> None:
    draw = random.Random(number)
    out, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.part"
    command = _both(finished, out)
    running = start(*command)
    # Answers come in windows, and the last one is left for the resume.
    wanted = draw.randrange(1, len(rows_of(whole)) - _WINDOW)
    wait_until(lambda: out.exists() or lines_of(part) > wanted, "so many answers")
    running.send_signal(signal.SIGKILL)
    assert running.end().code in (-signal.SIGKILL, 0)
    if out.exists():
        # The kill came after the last answer: at most what the command would have removed is left.
        assert out.read_bytes() == whole.read_bytes()
        left = {path.name for path in tmp_path.iterdir()}
        assert left <= {"answers.jsonl", "answers.jsonl.part", ".answers.jsonl.lock"}
        return
    with part.open("ab") as file:
        file.write(b'{"prompt": "half a li')
    done = start(*command).end()
    assert done.code == 0 and "going on after" in done.err, done.err
    assert out.read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_ctrl_c_keeps_what_there_is(finished: Finished, whole: Path, tmp_path: Path) -> None:
    out, part = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.part"
    running = start(*_both(finished, out))
    wait_until(lambda: lines_of(part) > 1, "answers")
    running.send_signal(signal.SIGINT)
    one_line(running.end(), STOPPED, "the same command goes on where it was")
    assert start(*_both(finished, out)).end().code == 0
    assert out.read_bytes() == whole.read_bytes()


def test_other_settings_do_not_go_on_with_a_file(
    command: Command, finished: Finished, few: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.jsonl"
    asks = ("generate", finished.run_dir, "--prompts", few, "--out", out)
    part = out.with_name("a.jsonl.part")
    part.write_text(json.dumps({"seed": 1}) + "\n")
    one_line(command(*asks), WRONG, f"{part} was begun with another", "remove it")
    part.unlink()
    assert command(*asks, *SHORT).code == 0
    one_line(command(*asks, *SHORT), WRONG, f"{out} exists")


def test_drawn_answers_depend_on_the_seed_alone(
    command: Command, finished: Finished, few: Path, tmp_path: Path
) -> None:
    def drawn(seed: int, name: str) -> list[str]:
        out = tmp_path / name
        asks = ("generate", finished.run_dir, "--prompts", few, "--out", out, *SHORT)
        done = command(*asks, "--temperature", "1.5", "--top-p", "0.9", "--seed", seed)
        assert done.code == 0, done.err
        return [row["answer"] for row in rows_of(out)]

    first = drawn(1, "a.jsonl")
    assert drawn(1, "b.jsonl") == first
    assert drawn(2, "c.jsonl") != first


def test_questions_of_mt_bench_see_the_answers_before(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    questions, out = tmp_path / "questions.jsonl", tmp_path / "a.jsonl"
    rows = [{"question_id": 1, "turns": ["A cow?", "An owl?"]}, {"question_id": 2, "turns": ["?"]}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asks = ("generate", finished.run_dir, "--prompts", questions, *SHORT)
    assert command(*asks, "--out", out, "--model", "base").code == 0
    first, second = rows_of(out)
    assert [turn["role"] for turn in first["messages"]] == ["user", "assistant", "user"]
    assert len(second["messages"]) == 1
    alone = tmp_path / "alone.jsonl"
    alone.write_text(json.dumps({"messages": first["messages"]}) + "\n", encoding="utf-8")
    again = tmp_path / "again.jsonl"
    asks = ("generate", finished.run_dir, "--prompts", alone, *SHORT)
    assert command(*asks, "--out", again, "--model", "base").code == 0
    assert rows_of(again)[0]["answer"] == first["answer"]
    in_form = tmp_path / "mt.jsonl"
    asks = ("generate", finished.run_dir, "--prompts", questions, *SHORT, "--format", "mt-bench")
    assert command(*asks, "--out", in_form, "--model", "base").code == 0
    told = rows_of(in_form)[0]
    assert told["choices"][0]["turns"] == [first["messages"][1]["content"], first["answer"]]
    assert told["model_id"] == "tiny-base"


def test_the_base_answers_before_there_is_a_run(
    command: Command, config: Path, few: Path, tmp_path: Path
) -> None:
    asks = ("generate", config, "--prompts", few, *SHORT)
    one_line(command(*asks, "--out", tmp_path / "a.jsonl"), WRONG, "does not exist; train it")
    assert command(*asks, "--out", tmp_path / "a.jsonl", "--model", "base").code == 0
    assert {row["model"] for row in rows_of(tmp_path / "a.jsonl")} == {"base"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--prompts", "none.txt"), "none.txt: cannot be read"),
        (("--prompts", "FEW", "--format", "openai", "--model", "both"), "second model"),
        (("--prompts", "FEW", "--top-p", "0"), "top_p"),
        (("--prompts", "FEW", "--temperature", "nan"), "temperature"),
        (("--prompts", "FEW", "--adapter", "none"), "none: no adapter_config.json"),
        (("--prompts", "FEW", "model.base=none/at/all"), "model.base"),
        (("--prompts", "FEW", "nam=x"), "nam"),
        ((), "Missing option '--prompts'"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    arguments: tuple[str, ...],
    told: str,
    command: Command,
    finished: Finished,
    few: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "a.jsonl"
    given = [str(few) if each == "FEW" else each for each in arguments]
    one_line(command("generate", finished.run_dir, *given, "--out", out), WRONG, told)
    assert not list(tmp_path.iterdir())


def test_a_prompt_without_room_for_an_answer_is_named(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    prompts = tmp_path / "long.txt"
    prompts.write_text("short\n" + "word " * 3000 + "\n", encoding="utf-8")
    done = command(
        "generate", finished.run_dir, "--prompts", prompts, "--out", tmp_path / "a.jsonl"
    )
    one_line(done, WRONG, "prompt 2 has", "no room for an answer")
