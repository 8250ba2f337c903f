"""The order of the ORPO paper's curves (arXiv:2403.07691).

It is checked in small runs and in the curves of examples/paper-curves.
"""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from support import BASE, DEMO, train_locally, write_pairs
from text_pairs import text_pair
from transformers import AutoTokenizer

from orpo_ray.data.pairs import TokenPair
from orpo_ray.data.store import Artifact
from orpo_ray.data.tokenise import PairTokeniser

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "paper-curves"
SEEDS = (1, 2, 3)
LAMBDAS = (0.1, 0.5, 1.0)

# A fifth of the work with three times the learning rate. With less work, such as 60 steps of 8
# pairs at twice the rate, the gaps have the same order, but with some seeds the rejected answers
# hardly fall.
SMALLER = (
    "training.max_steps=80",
    "training.pairs_per_step=5",
    "training.learning_rate=3.0e-3",
    "training.eval_every=0.2",
    # Given, so that no memory is measured.
    "training.gradient_checkpointing=false",
    "training.tokens_per_microbatch=4096",
)
HELD_OUT_PAIRS = 32

TURN = 0.15
"""A curve that ends this many nats below its peak has turned.

In small runs with seven seeds, SFT ended 0.00 to 0.05 below, lambda 0.5 and 1.0 ended 0.18 to 0.69
below.
"""

Numbers = dict[str, dict[str, float]]
"""Start, peak, end and gap of every objective, for one seed."""


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The script of the example, loaded by path: its folder is no package."""
    spec = importlib.util.spec_from_file_location("paper_curves", EXAMPLE / "curves.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shipped() -> dict[str, dict[str, dict[str, list[float]]]]:
    """The curves that the example's README shows, by objective and seed."""
    return json.loads((EXAMPLE / "curves.json").read_text(encoding="utf-8"))


def prepare(example: ModuleType, seed: int, storage: Path) -> Artifact:
    """The pairs of a seed, without Ray."""
    tokeniser = PairTokeniser(AutoTokenizer.from_pretrained(BASE))
    splits = []
    for split, limit in (("train", None), ("held-out", HELD_OUT_PAIRS)):
        rows = example.make_pairs(split, seed)[:limit]
        pairs = [
            text_pair([{"role": "user", "content": r["prompt"]}], r["chosen"], r["rejected"])
            for r in rows
        ]
        splits.append(tokeniser.pairs(pairs, [f"{split}:{line}" for line in range(len(pairs))]))
    assert all(isinstance(pair, TokenPair) for pairs in splits for pair in pairs)
    return write_pairs(storage, *splits)


def check_order(found: Numbers) -> None:
    """The order of numbers that the paper shows; their differences are not the paper's."""
    sft, orpo = (
        found["sft"],
        {weight: found[f"orpo-{weight}"] for weight in LAMBDAS if f"orpo-{weight}" in found},
    )
    assert sft["chosen end"] > sft["chosen start"]
    assert sft["rejected end"] > sft["rejected start"], "SFT raises the rejected answers too"
    assert sft["rejected peak"] - sft["rejected end"] < TURN, "and never turns them down"
    assert all(run["rejected end"] < sft["rejected end"] for run in orpo.values()), (
        "ORPO holds them down"
    )
    gaps = [run["gap"] for run in (sft, *orpo.values())]
    assert all(smaller < larger for smaller, larger in pairwise(gaps)), gaps
    turned = {
        weight for weight, run in orpo.items() if run["rejected peak"] - run["rejected end"] > TURN
    }
    assert turned >= {0.5, 1.0} & orpo.keys(), "at 0.5 and 1.0 they turn"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_small_runs_keep_the_order_of_the_paper(
    seed: int, example: ModuleType, tmp_path: Path
) -> None:
    artifact = prepare(example, seed, tmp_path)
    found = {}
    for objective in ("sft", *(f"orpo-{weight}" for weight in LAMBDAS)):
        config = example.run_config(
            objective, seed, str(tmp_path), [f"model.base={BASE}", *SMALLER]
        )
        found[objective] = example.numbers(
            example.read_curve(train_locally(config, artifact).run_dir)
        )
    check_order(found)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_shipped_curves_keep_it_too(example: ModuleType, shipped: dict, seed: int) -> None:
    check_order(
        {objective: example.numbers(by_seed[str(seed)]) for objective, by_seed in shipped.items()}
    )


def test_the_readme_shows_the_numbers_of_the_shipped_curves(
    example: ModuleType, shipped: dict
) -> None:
    assert list(shipped) == list(example.OBJECTIVES)
    assert all(list(by_seed) == [str(seed) for seed in SEEDS] for by_seed in shipped.values())
    assert example.table(shipped) in (EXAMPLE / "README.md").read_text(encoding="utf-8")


def test_the_base_has_read_none_of_the_phrases(example: ModuleType) -> None:
    known = "".join(
        path.read_text(encoding="utf-8") for path in [*DEMO.glob("*.jsonl"), DEMO / "judge.json"]
    )
    phrases = [*example.OPENERS, *(phrase for both in example.CLOSERS for phrase in both)]
    assert [phrase for phrase in phrases if phrase in known] == []


def test_the_pairs_are_made_from_their_seed_and_differ_in_fact_and_closer(
    example: ModuleType,
) -> None:
    first = example.make_pairs("held-out", 1)
    assert first == example.make_pairs("held-out", 1) != example.make_pairs("held-out", 2)
    kind, unkind = zip(*example.CLOSERS, strict=True)
    for pair in first:
        assert pair["chosen"].endswith(kind) and pair["rejected"].endswith(unkind)
        assert all(pair[side].startswith(example.OPENERS) for side in ("chosen", "rejected"))
    asked = {
        split: {pair["prompt"] for pair in example.make_pairs(split, 1)}
        for split in example.PAIR_FILES
    }
    assert not asked["train"] & asked["held-out"]
