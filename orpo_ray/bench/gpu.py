"""Everything that only a GPU can show, as one table: each row is a `bench` command of its own.

A row that fails costs that row, and what was measured before it is already written.
"""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orpo_ray.bench.start import COMMAND
from orpo_ray.bench.step import STEPS
from orpo_ray.errors import ConfigError, ResourceError, RunError
from orpo_ray.runs.console import Announce

_NARROW = 16
"""A tiny row has shapes so many times smaller."""


@dataclass(frozen=True)
class Row:
    """One command: a benchmark, and its options as words."""

    benchmark: str
    options: str

    @property
    def what(self) -> str:
        """The row's name: the command without what all rows have."""
        return f"{self.benchmark} {self.options}"

    def words(self, turns: int, *, tiny: bool) -> list[str]:
        """The words after `orpo-ray bench`; tiny ones compute on the CPU."""
        words = self.options.split()
        if tiny:
            words = [_narrow(word) for word in words]
            words += ["--hidden", "256"] if self.benchmark == "kernels" else ["--tiny"]
        device = "cpu" if tiny else "cuda"
        return [self.benchmark, *words, "--device", device, "--turns", str(turns), "--json"]


def _narrow(word: str) -> str:
    """Tokens, as 256/128/128 or 512, made fewer."""
    parts = word.split("/")
    if not all(part.isdecimal() for part in parts) or int(parts[0]) < _NARROW:
        return word
    return "/".join(str(int(part) // _NARROW) for part in parts)


ROWS = (
    Row("kernels", "--shape 1024/256/256 --pairs 4 --window 512"),
    Row("step", "--base mistral-7b --shape 256/256/256 --pairs 4"),
    Row("step", "--base mistral-7b --shape 1024/256/256 --pairs 4"),
    Row("step", "--base mistral-7b --shape 1024/256/256 --pairs 4 --window 512"),
    Row("step", "--base mistral-7b --shape 512/256/256 --pairs 4 --objective dpo"),
    Row("step", "--base llama-3-8b --shape 256/256/256 --pairs 4"),
    Row("step", "--base llama-3-8b --shape 256/128/128 --ragged 0.8 --pairs 8"),
    Row("step", "--base gemma-3-4b --shape 256/256/256 --pairs 4"),
    Row("step", "--base gemma-3-4b --shape 1024/256/256 --pairs 4"),
    Row("ablation", "--base llama-3-8b --shape 256/128/128 --ragged 0.8 --pairs 4"),
)


def bench_gpu(
    file: Path, announce: Announce, *, only: str, turns: int, tiny: bool
) -> dict[str, Any]:
    """Run the rows whose names contain `only`, and write the table to a Markdown file.

    Raises ConfigError if there is no such row or no place for the file, ResourceError without a
    GPU, and RunError, with the file written, if rows fail.
    """
    rows = [row for row in ROWS if only in row.what]
    if not rows:
        raise ConfigError(f"--only: no row has {only!r} in its name")
    # A table from before stays as it is.
    if not tiny and not torch.cuda.is_available():
        raise ResourceError("there is no CUDA device here; --tiny shows on a CPU that rows run")
    _refuse_place(file)
    found: list[tuple[Row, dict[str, Any]]] = []
    for number, row in enumerate(rows, 1):
        announce(f"{number} of {len(rows)}: orpo-ray bench {row.what}")
        found.append((row, _measure(row.words(turns, tiny=tiny))))
        file.write_text(table(found), encoding="utf-8")
    failed = [row.what for row, result in found if "error" in result]
    if failed:
        raise RunError(f"{file} says why these rows failed: {'; '.join(failed)}")
    return {"name": "gpu", "rows": [{"what": row.what, **result} for row, result in found]}


def _refuse_place(file: Path) -> None:
    try:
        file.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ConfigError(f"--write: {file} cannot be written: {error.strerror}") from error


def _measure(words: Sequence[str]) -> dict[str, Any]:
    """The result of a command; `error` in it says that it failed."""
    done = subprocess.run([*COMMAND, "bench", *words], capture_output=True, text=True, check=False)
    if done.stdout:
        result: dict[str, Any] = json.loads(done.stdout)
        return result
    # Only a process that is killed leaves no result, and its last words are about something else.
    return {"error": f"the command ended with exit code {done.returncode}"}


def table(found: Sequence[tuple[Row, dict[str, Any]]]) -> str:
    """The Markdown of what was measured."""
    good = [(row, result) for row, result in found if "error" not in result]
    lines = ["# Benchmarks on a GPU", ""]
    if good:
        about = good[0][1]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        lines += [f"{about['device']}, {about['turns']} turns; {versions}.", ""]
        if about["device"] == "cpu":
            lines += ["Tiny shapes on a CPU: these figures say only that the rows run.", ""]
    steps = [(row, result) for row, result in good if result["name"] == "step"]
    if steps:
        lines += [*_STEPS, *(_step(row, result) for row, result in steps), ""]
    for row, result in good:
        if result["name"] == "ablation":
            lines += [f"`orpo-ray bench {row.what}`:", "", *_techniques(result), ""]
        if result["name"] == "kernels":
            lines += [f"`orpo-ray bench {row.what}`:", "", *_kernels(result), ""]
    lines += [
        f"- `orpo-ray bench {row.what}` failed: {result['error']}"
        for row, result in found
        if "error" in result
    ]
    return "\n".join(lines).rstrip() + "\n"


_STEPS = (
    "Compared with stock TRL. `ratio` is stock / ours, memory ours / stock. The MFU counts what",
    "must be computed, of the peak in bfloat16. Differences are relative: loss, gradients.",
    "",
    "| `orpo-ray bench` | ratio | tokens/s, ours | MFU | memory | GB, ours / stock | differences |",
    "|---|---|---|---|---|---|---|",
)


def _step(row: Row, result: dict[str, Any]) -> str:
    ratio = f"{result['ratio']:.2f}"
    if "ratio_grouped" in result:
        ratio += f" ({result['ratio_grouped']:.2f} by length)"
    a_step = result["tokens_ours"] / STEPS
    share = "" if result["mfu"] is None else f"{result['mfu']:.0%}"
    cells = (
        f"`{row.what}`",
        ratio,
        f"{a_step / result['ours']:,.0f}",
        share,
        f"{result['memory_ratio']:.2f}",
        f"{result['memory_ours'] / 1e9:.2f} / {result['memory_stock'] / 1e9:.2f}",
        _differences(result["max_rel_loss_diff"], result["max_rel_grad_diff"]),
    )
    return f"| {' | '.join(cells)} |"


def _differences(*found: float | None) -> str:
    """JSON has null for what is no number."""
    return ", ".join("not a number" if each is None else f"{each:.1e}" for each in found)


def _techniques(result: dict[str, Any]) -> list[str]:
    return [
        "| technique | ratio | memory |",
        "|---|---|---|",
        *(
            f"| {name} | {each['ratio']:.2f} | {each['memory_ratio']:.2f} |"
            for name, each in result["techniques"].items()
        ),
    ]


def _kernels(result: dict[str, Any]) -> list[str]:
    return [
        "| kernel | ratio | seconds | differences: output, gradient |",
        "|---|---|---|---|",
        *(
            f"| {each['what']}{_path(each)} | {each['ratio']:.2f} | {_seconds(each)} | "
            f"{_differences(each['output_difference'], each['gradient_difference'])} |"
            for each in result["rows"]
        ),
    ]


def _path(each: dict[str, Any]) -> str:
    return f" ({each['path']})" if "path" in each else ""


def _seconds(each: dict[str, Any]) -> str:
    return ", ".join(f"{side} {seconds:.4f}" for side, seconds in each["seconds"].items())
