"""The table of `orpo-ray bench gpu`, and that a failed row costs that row alone."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_ray.bench import gpu
from orpo_ray.bench.gpu import ROWS, Row, bench_gpu, table
from orpo_ray.errors import ConfigError, ResourceError, RunError

ABOUT = {"device": "Abacus", "turns": 3, "versions": {"torch": "9.1"}}
SIDE = {
    "ratio": 2.5,
    "ours": 0.5,
    "tokens_ours": 4000,
    "mfu": 0.314,
    "memory_ratio": 0.25,
    "memory_ours": 2_000_000_000,
    "memory_stock": 8_000_000_000,
    "max_rel_loss_diff": 1e-3,
    "max_rel_grad_diff": 2e-3,
}
STEP = {"name": "step", **SIDE, **ABOUT}
KERNEL = {
    "what": "attention, window 512",
    "path": "flash varlen",
    "seconds": {"padded": 0.02, "ours": 0.01},
    "ratio": 2.0,
    "output_difference": 1e-3,
    "gradient_difference": 2e-3,
}
KERNELS = {"name": "kernels", "rows": [KERNEL], **ABOUT}
ABLATION = {
    "name": "ablation",
    "techniques": {"all": {"ratio": 2.5, "memory_ratio": 0.25}},
    **ABOUT,
}


def test_a_row_names_its_device_and_a_tiny_one_is_narrow() -> None:
    row = Row("step", "--base mistral-7b --shape 1024/256/256 --pairs 4 --window 512")
    assert row.words(7, tiny=False)[-5:] == ["--device", "cuda", "--turns", "7", "--json"]
    words = " ".join(row.words(1, tiny=True))
    assert words == (
        "step --base mistral-7b --shape 64/16/16 --pairs 4 --window 32 --tiny --device cpu "
        "--turns 1 --json"
    )


def test_the_rows_are_different_and_have_every_base_window_and_loss() -> None:
    assert len({row.what for row in ROWS}) == len(ROWS)
    said = " ".join(row.what for row in ROWS)
    for word in ("mistral-7b", "llama-3-8b", "gemma-3-4b", "--window", "dpo", "kernels"):
        assert word in said


def test_a_table_has_each_kind_of_result() -> None:
    grouped = {**STEP, "ratio_grouped": 1.5, "mfu": None, "max_rel_grad_diff": None}
    written = table(
        [
            (Row("step", "--a"), STEP),
            (Row("step", "--b"), grouped),
            (Row("kernels", "--c"), KERNELS),
            (Row("ablation", "--d"), ABLATION),
            (Row("step", "--e"), {"error": "no room"}),
        ]
    ).splitlines()
    assert "Abacus, 3 turns; torch 9.1." in written
    assert not any("Tiny" in line for line in written)
    assert "| `step --a` | 2.50 | 2,000 | 31% | 0.25 | 2.00 / 8.00 | 1.0e-03, 2.0e-03 |" in written
    assert any("| 2.50 (1.50 by length) | 2,000 |  | 0.25" in line for line in written)
    assert any(line.endswith("| 1.0e-03, not a number |") for line in written)
    assert (
        "| attention, window 512 (flash varlen) | 2.00 | padded 0.0200, ours 0.0100 | "
        "1.0e-03, 2.0e-03 |" in written
    )
    assert "| all | 2.50 | 0.25 |" in written
    assert written[-1] == "- `orpo-ray bench step --e` failed: no room"


def test_a_table_of_tiny_rows_says_that_they_are_no_measurement() -> None:
    assert "Tiny shapes on a CPU" in table([(Row("step", "--a"), {**STEP, "device": "cpu"})])


def test_a_row_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(words: list[str]) -> dict[str, Any]:
        return {"error": "no room"} if "--pairs" in words else STEP

    monkeypatch.setattr(gpu, "ROWS", (Row("step", "--pairs 9"), Row("step", "--ragged 0.5")))
    monkeypatch.setattr(gpu, "_measure", measure)
    file = tmp_path / "table.md"
    with pytest.raises(RunError, match=r"says why these rows failed: step --pairs 9$"):
        bench_gpu(file, lambda line: None, only="", turns=1, tiny=True)
    assert "no room" in file.read_text() and "`step --ragged 0.5`" in file.read_text()
    good = bench_gpu(file, lambda line: None, only="ragged", turns=1, tiny=True)
    assert [row["what"] for row in good["rows"]] == ["step --ragged 0.5"]
    with pytest.raises(ConfigError, match="--only: no row has 'gone' in its name"):
        bench_gpu(file, lambda line: None, only="gone", turns=1, tiny=True)


@pytest.mark.parametrize("place", ["gone/table.md", "."])
def test_a_place_that_takes_no_file_is_refused_before_a_row_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(gpu, "_measure", lambda words: pytest.fail("a row has run"))
    with pytest.raises(ConfigError, match=r"--write: .* cannot be written"):
        bench_gpu(tmp_path / place, lambda line: None, only="", turns=1, tiny=True)


def test_without_a_gpu_a_table_from_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "table.md"
    file.write_text("measured")
    with pytest.raises(ResourceError, match="there is no CUDA device here"):
        bench_gpu(file, lambda line: None, only="", turns=1, tiny=False)
    assert file.read_text() == "measured"


def test_a_command_that_is_killed_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = "import os; print('loading', file=os.sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(gpu, "COMMAND", (sys.executable, "-c", killed))
    assert gpu._measure(["step"]) == {"error": "the command ended with exit code -9"}


def test_a_command_that_fails_says_why() -> None:
    found = gpu._measure(["step", "--shape", "8", "--json"])
    assert found["error"].startswith("--shape: 8: write tokens")
    assert json.dumps(found)
