"""The cache of reference log-probs: computed when it must be, read when it can be, never trusted when it is broken."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import make_artifact

from orpo_ray.data.store import PairTable
from orpo_ray.training import reference
from orpo_ray.training.metrics import PairScores
from orpo_ray.training.reference import reference_log_probs

PAIRS = 5
INPUTS = {"data": "a", "model.base": "b", "versions": {"torch": "1"}}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> PairTable:
    return make_artifact(tmp_path_factory.mktemp("prepared"), train=PAIRS, evaluation=1).train


class Scorer:
    """Stands for the model: counts how often it is asked, and gives known numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        monkeypatch.setattr(reference, "score_pairs", self.score)

    def score(self, model: Any, table: PairTable, pad_id: int, token_budget: int, stop_requested: Any) -> PairScores:
        self.calls += 1
        chosen = -np.arange(1.0, len(table) + 1)
        return PairScores(chosen, 10 * chosen, table.lengths[:, 1], table.lengths[:, 2])


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch) -> Scorer:
    return Scorer(monkeypatch)


def ask(table: PairTable, cache: Path, said: list[str] | None = None, **changed: Any) -> np.ndarray:
    announce = [] if said is None else said
    return reference_log_probs(None, table, 0, 100, cache, {**INPUTS, **changed}, announce.append)  # type: ignore[arg-type]


def test_it_is_computed_once_and_read_back_the_same(table: PairTable, scorer: Scorer, tmp_path: Path) -> None:
    first, second = ask(table, tmp_path), ask(table, tmp_path)
    assert scorer.calls == 1
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, [[-n, -10 * n] for n in range(1, PAIRS + 1)])
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"], "nothing half-written stays"


def test_any_other_input_is_another_cache(table: PairTable, scorer: Scorer, tmp_path: Path) -> None:
    ask(table, tmp_path)
    for changed in ({"data": "x"}, {"model.base": "x"}, {"versions": {"torch": "2"}}, {"dtype": "bfloat16"}):
        ask(table, tmp_path, **changed)
    assert scorer.calls == len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("damage", ["cut short", "empty", "not safetensors", "another name", "too few rows"])
def test_a_damaged_file_is_announced_and_replaced(
    damage: str, table: PairTable, scorer: Scorer, tmp_path: Path
) -> None:
    ask(table, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    break_file(file, damage)
    said: list[str] = []
    log_probs = ask(table, tmp_path, said)
    assert scorer.calls == 2
    assert said[0].startswith(f"the cached reference log-probs {file.name} are damaged (")
    assert log_probs.shape == (PAIRS, 2)
    assert file.read_bytes() == whole


def break_file(file: Path, damage: str) -> None:
    whole = file.read_bytes()
    match damage:
        case "cut short":
            file.write_bytes(whole[: len(whole) // 2])
        case "empty":
            file.write_bytes(b"")
        case "not safetensors":
            file.write_bytes(b"x" * 100)
        case "another name":
            save_file({"something": np.zeros((PAIRS, 2))}, file)
        case "too few rows":
            save_file({"log_probs": np.zeros((PAIRS - 1, 2))}, file)
        case _:
            raise AssertionError(damage)
