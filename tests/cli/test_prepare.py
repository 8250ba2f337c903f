"""`orpo-ray prepare` for people and for scripts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.text import Text
from text_pairs import text_pair

from orpo_ray.cli.main import run
from orpo_ray.cli.show_pairs import colour_side, colour_tokens, count_tokens, length_histogram
from orpo_ray.data.pairs import TokenPair, ranges_of
from orpo_ray.data.tokenise import PairTokeniser

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    shared_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], ray_session: None
) -> Run:
    """Runs `orpo-ray prepare` with a tokenizer and a storage.

    Returns exit code, stdout and stderr.
    """
    tokenizer = str(shared_data / "tokenizers/minimind_chatml_6400")

    def call(*arguments: str, tokenizer: str = tokenizer) -> tuple[int, str, str]:
        code = run(
            ["prepare", "--tokenizer", tokenizer, "--storage", str(tmp_path / "st"), *arguments]
        )
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}!", "rejected": f"No {n}"} for n in range(40)]
    rows += [rows[0], {**rows[1], "rejected": rows[1]["chosen"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_show_prints_pairs_lengths_and_what_was_dropped(
    command: Run, pairs: Path, tmp_path: Path
) -> None:
    code, out, err = command("--train", str(pairs), "--show", "2")
    assert code == 0
    assert "prompt, not trained" in out
    assert out.count("<|im_start|>assistant") == 2
    assert "!<|im_end|>" in out
    assert "chosen and rejected are the same  pairs.jsonl:42" in out
    assert "exact duplicates" in out
    assert "tokens of prompt and longer answer" in out
    assert f"prepared: {tmp_path / 'st' / 'artifacts'}" in out
    assert "38 training pairs and 2 evaluation pairs from 42 rows" in err


def test_show_marks_the_turns_that_are_trained(command: Run, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    row = {"prompt": [*talk, talk[0]], "chosen": "Good day.", "rejected": "Go."}
    path = tmp_path / "talk.jsonl"
    other = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    path.write_text(
        f"{json.dumps(row)}\n{json.dumps(other)}\n" + json.dumps(row | {"chosen": "Hi"})
    )
    settings = ["model.chat_template=chatml", "data.train_on=all-assistant"]
    code, out, err = command("--train", str(path), "--show", "1", *settings)
    assert code == 0
    assert "not trained   earlier turn, trained   chosen, trained   rejected, trained" in out
    assert "of them trained" in out
    assert "those of the prompt by the likelihood term alone" in err


def test_trained_tokens_have_another_style_than_the_others(chatml_tokenizer: Any) -> None:
    ids = np.array(chatml_tokenizer("a b c d")["input_ids"], dtype=np.int32)
    shown = colour_side(chatml_tokenizer, ids, ranges_of((1, 3)), "green")
    assert shown.plain == chatml_tokenizer.decode(ids)
    styles = [str(span.style) for span in shown.spans]
    assert styles == ["bright_black", "green", "bright_black"]
    assert count_tokens(ids, ranges_of((1, 3))) == f"{len(ids)} tokens, 2 of them trained"
    assert count_tokens(ids, ranges_of()) == f"{len(ids)} tokens"


def test_json_is_one_object_alone_on_stdout(command: Run, pairs: Path) -> None:
    code, out, err = command("--train", str(pairs), "--show", "1", "--json")
    result = json.loads(out)
    assert code == 0
    assert (result["train"], result["eval"], result["read"]) == (38, 2, 42)
    assert (result["bad"], result["duplicates"]) == ({"identical": 1}, 1)
    assert Path(result["artifact"]).is_dir() and Path(result["quarantine"]).is_file()
    assert "<|im_start|>assistant" in err


def test_the_same_from_a_config_with_overrides(
    command: Run, pairs: Path, tmp_path: Path, shared_data: Path
) -> None:
    _, out, _ = command(
        "--train", str(pairs), "--json", "data.max_length=500", "data.max_prompt_length=90"
    )
    config = tmp_path / "run.yaml"
    config.write_text(
        f"name: demo\nstorage: {tmp_path / 'st'}\n"
        f"model: {{base: {shared_data / 'tokenizers/minimind_chatml_6400'}}}\n"
        f"data: {{train: [{{source: {pairs}}}], max_length: 500}}\n"
    )
    code, again, _ = command(str(config), "data.max_prompt_length=90", "--json")
    assert code == 0
    assert json.loads(again)["hash"] == json.loads(out)["hash"]


def test_columns(command: Run, tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text(
        "".join(json.dumps({"q": f"Q{n}", "good": "yes", "bad": "no"}) + "\n" for n in range(4))
    )
    code, out, err = command("--train", str(path))
    assert (code, out) == (2, "")
    assert err.startswith(f"orpo-ray: {path}: the columns are not recognised")
    code, out, _ = command(
        "--train", str(path), "--columns", "prompt=q,chosen=good,rejected=bad", "--json"
    )
    assert (code, json.loads(out)["train"]) == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "name a CONFIG.yaml, or give --tokenizer DIR --train FILE --storage DIR"),
        (["--train", "none.jsonl"], "none.jsonl: no such file"),
        (
            ["--train", "x.jsonl", "--columns", "prompt"],
            "is not of the form prompt=..,chosen=..,rejected=..",
        ),
        (["--train", "x.jsonl", "data.max_lenght=7"], "max_lenght"),
        (["none.yaml"], "none.yaml: no such file"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    command: Run, arguments: list[str], expected: str
) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("orpo-ray: ") and err.count("\n") == 1
    assert expected in err


def test_special_tokens_are_marked_and_letters_of_many_bytes_stay_whole(
    chatml_tokenizer: Any,
) -> None:
    [tokens] = PairTokeniser(chatml_tokenizer).pairs(
        [text_pair([{"role": "user", "content": "问"}], "机器学习", "é")], ["f:1"]
    )
    assert isinstance(tokens, TokenPair)
    shown = colour_tokens(chatml_tokenizer, tokens.chosen.tolist(), "green")
    assert isinstance(shown, Text)
    assert shown.plain == "机器学习<|im_end|>"
    assert [(shown.plain[span.start : span.end], str(span.style)) for span in shown.spans] == [
        ("机器学习", "green"),
        ("<|im_end|>", "green reverse"),
    ]


def test_histogram_bins_cover_every_pair_once() -> None:
    lengths = np.array([[3, 1, 2], [3, 2, 1], [10, 5, 20], [4, 4, 4]])
    rows = list(length_histogram(lengths).columns[0].cells)
    counts = [int(cell) for cell in length_histogram(lengths).columns[1].cells]
    assert sum(counts) == 4
    assert rows[0].startswith("5-") and rows[-1].endswith("-30")
