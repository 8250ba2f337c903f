"""`orpo-ray bench data`: both sides prepare the same rows, and the figures fit together."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from terminal import Command

ROWS = 24
LIST_HEAVY = (
    "import sys; from orpo_ray.cli.main import run; code = run(['bench', 'data', '--help']);"
    "print(code, {'torch', 'ray', 'transformers', 'trl'} & set(sys.modules))"
)


def test_help_loads_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIST_HEAVY], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 set()"


@pytest.mark.ray
@pytest.mark.slow
def test_both_sides_make_the_same_of_the_same_rows(command: Command) -> None:
    done = command("bench", "data", "--rows", ROWS, "--repetitions", 1, "--json")
    result = json.loads(done.out)
    assert done.code == 0
    assert (result["name"], result["device"], result["rows"]) == ("data", "cpu", ROWS)
    assert result["pairs_ours"] == result["pairs_stock"] == ROWS
    # The demo's template closes a turn with the end token alone, so that stock adds none of its own.
    assert result["tokens_ours"] == result["tokens_stock"] > 2 * ROWS * 150
    assert result["ours"] == pytest.approx(ROWS / result["seconds_ours"][0])
    assert result["stock"] == pytest.approx(ROWS / (result["seconds_stock"][0] - result["startup_stock"]))
    assert result["ratio"] == pytest.approx(result["ours"] / result["stock"])


@pytest.mark.ray
@pytest.mark.slow
def test_a_file_of_ones_own_gives_as_many_rows_as_it_has(command: Command, tmp_path: Path) -> None:
    good = [{"prompt": f"Say {n}.", "chosen": f"{n}!", "rejected": f"No {n}"} for n in range(10)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*good, good[0], {"prompt": "no answers"}]))
    done = command("bench", "data", "--data", file, "--repetitions", 1)
    assert done.code == 0
    assert "11 rows on" in done.out
    assert "ours dropped 1 (duplicates)" in done.out


@pytest.mark.ray
@pytest.mark.slow
def test_the_cost_of_ray_is_that_of_its_turns_and_nothing_stays_behind(command: Command) -> None:
    done = command("bench", "ray", "--seconds", 2, "--turns", 2, "--starts", 1, "--json")
    result = json.loads(done.out)
    assert done.code == 0, done.err
    assert (result["name"], result["device"], result["workers"]) == ("ray", "cpu", 2)
    for side in ("bare", "ray"):
        assert len(result["turns"][side]) == 2
        assert result[side] == pytest.approx(sum(result["turns"][side]) / 2)
    assert result["ratio"] == pytest.approx(result["bare"] / result["ray"])
    assert not [p for p in psutil.process_iter(["cmdline"]) if "orpo-ray-bench-" in " ".join(p.info["cmdline"] or ())]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "0"], "--rows"),
        (["--max-length", "3"], "--max-length"),
        (["--tokenizer", "./no-such"], "no folder ./no-such"),
        (["--data", "./no-such.jsonl"], "no-such.jsonl: no such file"),
    ],
)
def test_wrong_use_is_one_line(command: Command, arguments: list[str], said: str) -> None:
    done = command("bench", "data", *arguments, "--json")
    assert done.code == 2
    assert said in json.loads(done.out)["error"]
    assert said in done.err.splitlines()[-1]
