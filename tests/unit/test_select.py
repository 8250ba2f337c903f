"""Duplicates, the held-out share and weights, decided on small tables by hand."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from orpo_ray.config.data import Source
from orpo_ray.data.rows import RESULT, facts_of
from orpo_ray.data.select import select_pairs
from orpo_ray.data.store import TRAINED


def table(*rows: tuple[int, str, str]) -> pa.Table:
    """Rows of (source, pair, prompt); a pair "" is a bad row, "good..." has no worse answer."""
    values: list[dict[str, Any]] = [
        {
            "source": source,
            "line": line,
            "code": "" if pair else "identical",
            "pair_id": f"f:{line}",
            "pair_key": pair.encode(),
            "prompt_key": prompt.encode(),
            "chosen": [] if pair.startswith("bad") else [1],
            "rejected": [] if pair.startswith("good") else [1],
            **{name: [] for name in TRAINED},
        }
        for line, (source, pair, prompt) in enumerate(rows)
    ]
    return facts_of(pa.Table.from_pylist(values, schema=RESULT))


def sources(*weights: float) -> list[Source]:
    return [Source(source=f"{n}.jsonl", weight=weight) for n, weight in enumerate(weights)]


def chosen(*arguments: Any, seed: int) -> dict[str, Any]:
    """What `select_pairs` chooses, as plain lists."""
    found = asdict(select_pairs(*arguments, seed=seed))
    return {name: np.asarray(value).tolist() for name, value in found.items()}


def test_the_first_of_equal_pairs_stays() -> None:
    rows = table(
        (0, "a", "p"),
        (0, "", ""),
        (0, "b", "q"),
        (0, "a", "p"),
        (1, "a", "p"),
        (2, "b", "q"),
        (2, "b", "q"),
    )
    assert chosen(rows, sources(1, 1), None, seed=0) == {
        "train": [0, 2],
        "eval": [5],
        "kept": [0, 2, 5],
        "duplicates": [3, 4, 6],
        "near": [],
        "overlap": 1,
    }


def test_near_and_equal_pairs_are_dropped_only_if_asked() -> None:
    rows = table((0, "a", "p"), (0, "b", "q"), (0, "c", "r"), (1, "b", "q"), (1, "d", "s"))

    def near(train: Any, evaluation: Any) -> Any:
        assert evaluation.tolist() == [3, 4]
        return np.isin(train, [1, 2])  # an equal pair is near, too

    found = select_pairs(rows, sources(1), None, seed=0, are_near=near)
    assert (found.train.tolist(), found.near.tolist(), found.overlap) == ([0, 1, 2], [2], 1)
    found = select_pairs(rows, sources(1), None, seed=0, are_near=near, drop_near=True)
    assert (found.train.tolist(), found.near.tolist(), found.overlap) == ([0], [1, 2], 0)


def test_weights_repeat_pairs_and_draw_the_rest() -> None:
    rows = table(*((0, f"a{n}", "p") for n in range(10)), *((1, f"b{n}", "q") for n in range(10)))
    found = chosen(rows, sources(2.5, 0.5), None, seed=1)
    first = [index for index in found["train"] if index < 10]
    second = [index for index in found["train"] if index >= 10]
    assert {first.count(index) for index in range(10)} == {2, 3}
    assert (len(first), len(second), len(set(second))) == (25, 5, 5)
    assert found["train"] == sorted(found["train"])
    assert chosen(rows, sources(2.5, 0.5), None, seed=1) == found
    assert chosen(rows, sources(2.5, 0.5), None, seed=2) != found
    assert len(found["kept"]) == 20


def test_held_out_prompts_are_not_trained() -> None:
    rows = table(*((0, f"pair{n}", f"prompt{n // 3}") for n in range(300)))
    found = select_pairs(rows, sources(1), 0.1, seed=7)
    assert len(found.eval) == 30
    assert sorted([*found.train, *found.eval]) == list(range(300))
    assert {index // 3 for index in found.eval}.isdisjoint(index // 3 for index in found.train)
    assert select_pairs(rows, sources(1), 0.1, seed=8).eval.tolist() != found.eval.tolist()
    assert found.overlap == 0


def test_a_large_prompt_group_does_not_swallow_the_training_pairs() -> None:
    rows = table(*((0, f"pair{n}", "same" if n < 95 else f"prompt{n}") for n in range(100)))
    for seed in range(10):
        found = select_pairs(rows, sources(1), 0.05, seed)
        assert len(found.eval) == 5
        assert min(found.eval) >= 95


@pytest.mark.parametrize(
    ("prompts", "held_out"), [(["p"], 0), (["p", "p"], 0), (["p", "q"], 1), (["p", "p", "q"], 1)]
)
def test_small_sets(prompts: list[str], held_out: int) -> None:
    rows = table(*((0, f"pair{n}", prompt) for n, prompt in enumerate(prompts)))
    found = select_pairs(rows, sources(1), 0.05, seed=3)
    assert len(found.eval) == held_out
    assert len(found.train) == len(prompts) - held_out


@pytest.mark.parametrize("seed", range(6))
def test_of_few_answers_of_one_kind_some_are_held_out(seed: int) -> None:
    rows = [(0, f"good {n}", f"q{n}") for n in range(100)]
    rows += [(0, f"bad {n}", f"r{n}") for n in range(2)]
    found = chosen(table(*rows), sources(1), 0.05, seed=seed)
    bad = {100, 101}
    assert len(bad & set(found["eval"])) == len(bad & set(found["train"])) == 1
    assert 5 <= len(found["eval"]) <= 6
