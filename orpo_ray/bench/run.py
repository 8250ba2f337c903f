"""A whole run on a real base: ours and a stock TRL script, each in processes of its own, in turns.

Both train the same pairs in the same order, with the same adapter, quantisation, rate, schedule and
evaluations, from the command to the adapter on disk.
"""

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from orpo_ray.bench.pairs import tokenizer_at, usable_pairs, write_rows
from orpo_ray.bench.start import COMMAND, STOCK
from orpo_ray.bench.watch import Cost, watch
from orpo_ray.config.model import ModelConfig
from orpo_ray.data.pairs import Pair, TokenPair
from orpo_ray.data.tokenise import PairTokeniser
from orpo_ray.errors import DataError, RunError
from orpo_ray.models.tokenizer import base_location, make_local
from orpo_ray.runs.console import SILENT, Announce
from orpo_ray.training.plan import step_pairs

EVAL_PAIRS = 48
_SEED = 0
_STOCK_PAIRS = 8
"""The most pairs of stock's micro-batch, and those of its evaluations: transformers' default."""
_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
_RATES = {"orpo": 2.0e-4, "dpo": 5.0e-5}
_BETA = 0.1
_OURS = ("auto", "same")
"""Ours as it decides by itself, and with the micro-batch and the checkpointing of stock."""


@dataclass(frozen=True, kw_only=True)
class RunCase:
    """What is trained: so many steps of `pairs` pairs of a file in any format that is read."""

    base: str
    data: str
    steps: int
    pairs: int
    objective: str
    quantization: str
    max_length: int

    @property
    def micro_batch(self) -> int:
        """Pairs of one of stock's micro-batches: as many as divide a step, and fit."""
        return max(size for size in range(1, _STOCK_PAIRS + 1) if self.pairs % size == 0)


def bench_run(case: RunCase, turns: int, announce: Announce) -> dict[str, Any]:
    """Medians over the turns of seconds and memory, their ratios, and the held-out NLL of both.

    Raises DataError for too few pairs, and RunError if a side fails.
    """
    model = ModelConfig(base=case.base)
    make_local(model, announce)
    with tempfile.TemporaryDirectory(prefix="orpo-ray-bench-") as name:
        folder = Path(name)
        tokens = _write_pairs(case, folder)
        for side in _OURS:
            _write_ours(case, folder, side, tokens)
        costs: dict[str, list[Cost]] = {side: [] for side in (*_OURS, "stock")}
        for turn in range(turns):
            for side in costs:
                costs[side].append(_train(case, folder, side, turn))
                taken = costs[side][-1]
                announce(
                    f"{side}, turn {turn + 1} of {turns}: {taken.cpu_s:.0f} CPU s, "
                    f"{taken.wall_s:.0f} s, {taken.peak_bytes / 1e9:.2f} GB"
                )
        nll = {side: _nll(case, folder, side) for side in costs}
    return {"name": "run", **_figures(costs), **_about(case, turns), "nll": nll} | {
        "nll_ours": nll["auto"],
        "nll_stock": nll["stock"],
    }


def _figures(costs: dict[str, list[Cost]]) -> dict[str, Any]:
    """Ratios are stock / ours for seconds, and ours / stock for memory."""
    middle = {
        side: {
            "cpu_s": statistics.median(cost.cpu_s for cost in found),
            "wall_s": statistics.median(cost.wall_s for cost in found),
            "peak_bytes": statistics.median(cost.peak_bytes for cost in found),
        }
        for side, found in costs.items()
    }
    stock, auto, same = middle["stock"], middle["auto"], middle["same"]
    return {
        "sides": middle,
        "cpu_ratio": stock["cpu_s"] / auto["cpu_s"],
        "wall_ratio": stock["wall_s"] / auto["wall_s"],
        "memory_ratio": same["peak_bytes"] / stock["peak_bytes"],
        "cpu_ratio_same": stock["cpu_s"] / same["cpu_s"],
        "memory_ratio_auto": auto["peak_bytes"] / stock["peak_bytes"],
    }


def _about(case: RunCase, turns: int) -> dict[str, Any]:
    return {
        "base": case.base,
        "objective": case.objective,
        "quantization": case.quantization,
        "steps": case.steps,
        "pairs": case.pairs,
        "micro_batch": case.micro_batch,
        "eval_pairs": EVAL_PAIRS,
        "turns": turns,
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _write_pairs(case: RunCase, folder: Path) -> int:
    """Write the files of pairs; returns how many tokens a micro-batch of stock's has in ours.

    Stock reads them in the order in which our steps take them.
    """
    count = case.steps * case.pairs
    found = list(islice(_fitting(case), count + EVAL_PAIRS))
    if len(found) < count + EVAL_PAIRS:
        raise DataError(
            f"{case.data}: {len(found)} different pairs fit into {case.max_length} tokens, but "
            f"{case.steps} steps of {case.pairs} and {EVAL_PAIRS} held-out ones are needed; lower "
            "--steps or --pairs, or raise --max-length"
        )
    rows = [pair for pair, _ in found]
    order = np.concatenate(step_pairs(count, case.pairs, _SEED, 0))
    for name, some in (
        ("train", rows[:count]),
        ("stock", [rows[number] for number in order]),
        ("eval", rows[count:]),
    ):
        write_rows(folder / f"{name}.jsonl", some)
    lengths = [len(p.prompt) + len(p.chosen) + len(p.rejected) for _, p in found[:count]]
    return round(case.micro_batch * sum(lengths) / count)


def _fitting(case: RunCase) -> Iterator[tuple[Pair, TokenPair]]:
    """Different pairs of one turn each that fit into the length, with their tokens."""
    tokeniser, seen = PairTokeniser(tokenizer_at(case.base, SILENT.announce, "--base")), set()
    for number, pair in enumerate(usable_pairs(case.data)):
        if pair.before_chosen or pair.before_rejected or pair.context or not _is_whole(pair):
            continue
        (tokens,) = tokeniser.pairs([pair], [str(number)])
        if not isinstance(tokens, TokenPair):
            continue
        key = tuple(ids.tobytes() for ids in (tokens.prompt, tokens.chosen, tokens.rejected))
        longest = len(tokens.prompt) + max(len(tokens.chosen), len(tokens.rejected))
        if longest <= case.max_length and key not in seen:
            seen.add(key)
            yield pair, tokens


def _is_whole(pair: Pair) -> bool:
    return pair.chosen is not None and pair.rejected is not None


def _write_ours(case: RunCase, folder: Path, side: str, tokens: int) -> None:
    """The config of one of our sides."""
    objective: dict[str, Any] = {"kind": "dpo", "beta": _BETA}
    if case.objective == "orpo":
        objective = {"kind": "orpo", "lambda": _BETA, "nll_on": "full"}
    memory: dict[str, Any] = {}
    if side == "same":
        memory = {"tokens_per_microbatch": tokens, "gradient_checkpointing": False}
    settings = {
        "name": side,
        "model": {"base": case.base, "quantization": case.quantization, "dtype": "float32"},
        "adapter": {"r": 16, "alpha": 16, "dropout": 0.0},
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": str(folder / "eval.jsonl"),
            "max_length": case.max_length,
        },
        "objective": objective,
        "training": {
            "pairs_per_step": case.pairs,
            "max_steps": case.steps,
            "learning_rate": _RATES[case.objective],
            "schedule": "cosine",
            "warmup": 0,
            "eval_every": 1.0,
            "checkpoint_every": 1.0,
            "samples": 0,
            "seed": _SEED,
            **memory,
        },
        "scale": {"workers": 1},
    }
    (folder / f"{side}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def _train(case: RunCase, folder: Path, side: str, turn: int) -> Cost:
    if side != "stock":
        # A storage of its own, so that each run prepares the pairs, as each of stock's does.
        storage = f"storage={folder / f'{side}-{turn}'}"
        return watch([*COMMAND, "train", str(folder / f"{side}.yaml"), storage])
    settings = {
        "folder": str(folder / f"stock-{turn}"),
        "objective": case.objective,
        "base": base_location(ModelConfig(base=case.base)),
        "quantization": case.quantization,
        "train": str(folder / "stock.jsonl"),
        "eval": str(folder / "eval.jsonl"),
        "pairs": case.steps * case.pairs,
        "eval_pairs": EVAL_PAIRS,
        "steps": case.steps,
        "micro_batch": case.micro_batch,
        "eval_batch": _STOCK_PAIRS,
        "accumulation": case.pairs // case.micro_batch,
        "max_length": case.max_length,
        "beta": _BETA,
        "learning_rate": _RATES[case.objective],
    }
    path = folder / f"stock-{turn}.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return watch([*STOCK, str(path)])


def _nll(case: RunCase, folder: Path, side: str) -> float:
    """The NLL of the held-out pairs by the adapter that a side left in its first turn.

    One and the same command judges all of them.
    """
    left = folder / f"{side}-0"
    place = left if side == "stock" else left / side / "adapter"
    judge = [*COMMAND, "evaluate", str(folder / "auto.yaml"), f"storage={folder / 'auto-0'}"]
    options = ["--adapter", str(place), "--samples", "0", "--json"]
    done = subprocess.run([*judge, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"the held-out pairs were not judged: {done.stderr.strip()}")
    found = json.loads(done.stdout)["metrics"]["trained"]
    return float(found["all"]["nll"])
