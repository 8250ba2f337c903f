"""`orpo-ray bench`: both sides do the same work, and the figures fit together."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support import BASE, ENVIRONMENT
from terminal import Command

from orpo_ray.bench import gpu
from orpo_ray.bench.gpu import Row
from orpo_ray.bench.run import RunCase

ROWS = 24
LIST_HEAVY = (
    "import sys; from orpo_ray.cli.main import run; code = run(['bench', 'data', '--help']);"
    "print(code, {'torch', 'ray', 'transformers', 'trl'} & set(sys.modules))"
)


def benchmarks() -> set[psutil.Process]:
    """The processes of benchmarks on this machine, on which somebody else may have one, too."""
    return {
        process
        for process in psutil.process_iter(["cmdline"])
        if "orpo-ray-bench-" in " ".join(process.info["cmdline"] or ())
    }


def test_help_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIST_HEAVY], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 set()"


@pytest.mark.ray
@pytest.mark.slow
def test_both_sides_make_the_same_of_the_same_rows(command: Command) -> None:
    done = command("bench", "data", "--rows", ROWS, "--repetitions", 1, "--json")
    result = json.loads(done.out)
    assert done.code == 0
    assert (result["name"], result["device"], result["rows"]) == ("data", "cpu", ROWS)
    assert result["pairs_ours"] == result["pairs_stock"] == ROWS
    # The demo's template closes a turn with the end token alone, so that stock adds none of its
    # own.
    assert result["tokens_ours"] == result["tokens_stock"] > 2 * ROWS * 150
    assert result["ours"] == pytest.approx(ROWS / result["seconds_ours"][0])
    assert result["stock"] == pytest.approx(
        ROWS / (result["seconds_stock"][0] - result["startup_stock"])
    )
    assert result["ratio"] == pytest.approx(result["ours"] / result["stock"])


@pytest.mark.ray
@pytest.mark.slow
def test_a_file_of_ones_own_gives_as_many_rows_as_it_has(command: Command, tmp_path: Path) -> None:
    good = [{"prompt": f"Say {n}.", "chosen": f"{n}!", "rejected": f"No {n}"} for n in range(10)]
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in [*good, good[0], {"prompt": "no answers"}])
    )
    done = command("bench", "data", "--data", file, "--repetitions", 1)
    assert done.code == 0
    assert "11 rows on" in done.out
    assert "ours dropped 1 (duplicates)" in done.out


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.slow
def test_the_cost_of_ray_is_that_of_its_turns_and_nothing_stays_behind(command: Command) -> None:
    before = benchmarks()
    done = command("bench", "ray", "--seconds", 2, "--turns", 2, "--starts", 1, "--json")
    result = json.loads(done.out)
    assert done.code == 0, done.err
    assert (result["name"], result["device"], result["workers"]) == ("ray", "cpu", 2)
    for side in ("bare", "ray"):
        assert len(result["turns"][side]) == 2
        assert result[side] == pytest.approx(sum(result["turns"][side]) / 2)
    assert result["ratio"] == pytest.approx(result["bare"] / result["ray"])
    assert benchmarks() <= before


KEYS = {
    "name",
    "ratio",
    "ours",
    "stock",
    "tokens_ours",
    "tokens_stock",
    "memory_ratio",
    "max_rel_loss_diff",
    "max_rel_grad_diff",
    "device",
    "versions",
}
SMALL = ("--hidden", 64, "--vocab", 300, "--turns", 1, "--json")
WITHOUT_RAY = """
import json, sys
sys.modules |= dict.fromkeys(("ray", "deepspeed", "optuna"))
from orpo_ray.cli.main import run
sys.exit(max(run(words) for words in json.loads(sys.argv[1])))
"""
"""Runs commands as on a machine without Ray, DeepSpeed and Optuna."""


def check_sides(result: dict[str, Any]) -> None:
    """What every comparison with stock must result in."""
    assert result.keys() >= KEYS
    assert result["device"] == "cpu" and result["versions"]["trl"]
    assert result["max_rel_loss_diff"] < 1e-5 and result["max_rel_grad_diff"] < 1e-4
    # With one turn each, the median is that turn, and the ratio compares the two.
    assert result["ratio"] == pytest.approx(result["stock"] / result["ours"])


@pytest.mark.slow
def test_a_step_is_the_same_on_both_sides_and_needs_no_ray(tmp_path: Path) -> None:
    """Each pair has 40 + 10 + 20 tokens. Stock computes its prompt twice and pads to 60."""
    common = [str(word) for word in ("bench", "step", "--shape", "40/10/20", "--pairs", 3, *SMALL)]
    others = (("--objective", "orpo"), ("--objective", "dpo"), ("--window", "16"))
    asked = json.dumps([[*common, *other] for other in others])
    command = [sys.executable, "-c", WITHOUT_RAY, asked]
    done = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 3
    for result in results:
        check_sides(result)
        assert result["name"] == "step"
        assert result["tokens_ours"] == 4 * 3 * (40 + 10 + 20)
        assert result["tokens_stock"] == 4 * 3 * 2 * 60
        low, middle, high = result["ours_planned"]
        assert 0 < low < middle < high
        assert result["memory_planned"] == pytest.approx(result["memory_ours"], rel=0.3)
        assert "ratio_grouped" not in result, "pairs of one length cannot be grouped by it"


@pytest.mark.slow
def test_pairs_of_a_file_are_those_that_fit(command: Command, tmp_path: Path) -> None:
    short = [
        {"prompt": f"Say {n}.", "chosen": "yes " * (5 * n % 12 + 1), "rejected": "no"}
        for n in range(12)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in [{**short[0], "chosen": "word " * 400}, *short])
    )
    options = ("--data", file, "--tokenizer", BASE, "--max-length", 100)
    done = command("bench", "step", *options, "--pairs", 3, *SMALL)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    check_sides(result)
    assert result["tokens_stock_grouped"] < result["tokens_stock"]
    few = command("bench", "step", *options, "--pairs", 4, *SMALL)
    assert (
        few.code == 2
        and "12 pairs fit into 100 tokens, but 16 are needed" in json.loads(few.out)["error"]
    )


@pytest.mark.slow
def test_the_head_alone_scores_what_the_loss_needs(command: Command) -> None:
    """For 2 pairs of 8 + 8 + 8 tokens stock makes 2 * 2 * 16 logits, ours 7 + 8 + 8 a pair."""
    done = command("bench", "head", "--shape", "8/8/8", *SMALL)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    check_sides(result)
    assert (result["tokens_ours"], result["tokens_stock"]) == (2 * 23, 64)
    assert result["memory_ratio"] < 1


@pytest.mark.long
@pytest.mark.slow
def test_each_technique_is_measured_alone(command: Command) -> None:
    done = command("bench", "ablation", "--shape", "30/10/10", "--pairs", 2, *SMALL)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result.keys() >= KEYS
    assert result["max_rel_loss_diff"] < 1e-5 and result["max_rel_grad_diff"] < 1e-4
    tokens = {name: found["tokens"] for name, found in result["techniques"].items()}
    assert (
        tokens["selected log-probs"]
        == tokens["gradient in the forward pass"]
        == result["tokens_stock"]
    )
    assert (
        tokens["all"]
        == tokens["shared prompts, no padding"]
        < tokens["no padding"]
        < result["tokens_stock"]
    )
    assert result["techniques"]["all"]["ratio"] == result["ratio"]


@pytest.mark.slow
@pytest.mark.parametrize("row", gpu.ROWS, ids=lambda row: row.what.replace("/", "-"))
def test_each_row_for_a_gpu_runs_on_a_cpu_if_it_is_tiny(command: Command, row: Row) -> None:
    done = command("bench", *row.words(1, tiny=True))
    assert done.code == 0, done.err
    result = json.loads(done.out)
    if row.benchmark != "kernels":
        assert result.keys() >= KEYS
        assert result["max_rel_loss_diff"] < 1e-5 and result["max_rel_grad_diff"] < 1e-4
        return
    assert [each["what"][:9] for each in result["rows"]] == ["attention", "attention", "a layer o"]
    for each in result["rows"]:
        assert each["output_difference"] < 1e-6 and each["gradient_difference"] < 1e-6


@pytest.mark.long
def test_all_rows_for_a_gpu_make_one_table(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "table.md"
    done = command("bench", "gpu", "--tiny", "--turns", 1, "--write", file, "--json")
    assert done.code == 0, done.err
    assert [row["what"] for row in json.loads(done.out)["rows"]] == [row.what for row in gpu.ROWS]
    written = file.read_text()
    assert all(f"{row.what}`" in written for row in gpu.ROWS) and "failed" not in written


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--shape", "12/3"], 2, "--shape: 12/3: write tokens of prompt, chosen and rejected"),
        (["--shape", "0/3/3"], 2, "--shape"),
        (["--objective", "kto"], 2, "--objective"),
        (["--data", "pairs.jsonl"], 2, "--data and --tokenizer go together"),
        (
            ["--base", "llama-3-8b"],
            2,
            "--base: llama-3-8b in NF4 is measured on a GPU; add --device cuda",
        ),
        (["--tiny"], 2, "--tiny makes a --base small; name one"),
        (
            ["--base", "gemma-3-4b", "--tiny", "--vocab", "300"],
            2,
            "--hidden and --vocab are those of gemma-3-4b; leave them out",
        ),
        (
            ["--base", "llama-3-8b", "--tiny", "--window", "8"],
            2,
            "--window: llama-3-8b has none; take mistral-7b",
        ),
        (["--device", "cuda"], 3, "--device: there is no CUDA device here"),
    ],
)
def test_a_case_that_cannot_be_measured_is_one_line(
    command: Command, arguments: list[str], code: int, said: str
) -> None:
    if code == 3 and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    done = command("bench", "step", *arguments, "--json")
    assert done.code == code
    assert said in json.loads(done.out)["error"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "0"], "--rows"),
        (["--max-length", "3"], "--max-length"),
        (["--tokenizer", "./no-such"], "--tokenizer: no folder ./no-such"),
        (["--data", "./no-such.jsonl"], "no-such.jsonl: no such file"),
    ],
)
def test_wrong_use_is_one_line(command: Command, arguments: list[str], said: str) -> None:
    done = command("bench", "data", *arguments, "--json")
    assert done.code == 2
    assert said in json.loads(done.out)["error"]
    assert said in done.err.splitlines()[-1]


@pytest.mark.long
@pytest.mark.parametrize("objective", ["orpo", "dpo"])
def test_a_whole_run_and_a_stock_script_learn_the_same(command: Command, objective: str) -> None:
    """On the demo's base: the same pairs in the same order, the same rates, the same NLL."""
    words = ["--steps", 4, "--pairs", 8, "--max-length", 96, "--objective", objective, "--json"]
    done = command("bench", "run", "--base", BASE, "--data", BASE.parent / "train.jsonl", *words)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    auto, same, stock = (found["sides"][side] for side in ("auto", "same", "stock"))
    assert found["cpu_ratio"] == pytest.approx(stock["cpu_s"] / auto["cpu_s"])
    assert found["wall_ratio"] == pytest.approx(stock["wall_s"] / auto["wall_s"])
    assert found["memory_ratio"] == pytest.approx(same["peak_bytes"] / stock["peak_bytes"])
    assert min(auto["cpu_s"], stock["cpu_s"]) > 1 and stock["peak_bytes"] > 2e8
    assert found["nll_ours"] == pytest.approx(found["nll_stock"], rel=2e-3)
    assert found["nll"]["same"] == pytest.approx(found["nll_ours"], rel=1e-4)


@pytest.mark.parametrize(("pairs", "micro_batch"), [(1, 1), (3, 3), (10, 5), (11, 1), (16, 8)])
def test_stock_gets_the_largest_micro_batch_that_divides_a_step(
    pairs: int, micro_batch: int
) -> None:
    case = RunCase(
        base="b",
        data="d",
        steps=1,
        pairs=pairs,
        objective="orpo",
        quantization="nf4",
        max_length=96,
    )
    assert case.micro_batch == micro_batch


def test_a_whole_run_names_the_base_that_is_not_there(command: Command) -> None:
    done = command("bench", "run", "--base", "./no-such", "--data", BASE.parent / "train.jsonl")
    assert done.code == 2
    assert "--base: no folder ./no-such" in done.err


def test_a_whole_run_asks_for_enough_pairs(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}) + "\n")
    done = command("bench", "run", "--base", BASE, "--data", file, "--steps", 2)
    assert done.code == 2
    assert "1 different pairs fit into 512 tokens, but 2 steps of 16 and 48 held-out" in done.err
