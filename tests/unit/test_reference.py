"""The cache of reference log-probs: it is read if it is whole, and computed again if it is not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from orpo_ray.training.reference import ReferenceCache

PAIRS = 5
INPUTS = {"data": "a", "model.base": "b", "versions": {"torch": "1"}}
LOG_PROBS = np.stack([-np.arange(1.0, PAIRS + 1), -10 * np.arange(1.0, PAIRS + 1)], axis=1)


def cache_of(folder: Path, **changed: Any) -> ReferenceCache:
    return ReferenceCache(folder, {**INPUTS, **changed})


def test_what_was_written_is_read_back_the_same_and_announced(tmp_path: Path) -> None:
    said: list[str] = []
    assert cache_of(tmp_path / "new").read(PAIRS, said.append) is None
    cache_of(tmp_path / "new").write(LOG_PROBS)
    assert said == []
    found = cache_of(tmp_path / "new").read(PAIRS, said.append)
    assert found is not None
    np.testing.assert_array_equal(found, LOG_PROBS)
    assert found.dtype == LOG_PROBS.dtype
    (file,) = (tmp_path / "new").iterdir()
    assert file.suffix == ".safetensors", "nothing half-written stays"
    assert said == [f"reference log-probs: reused from {file.name}"]


def test_any_other_input_is_another_cache(tmp_path: Path) -> None:
    cache_of(tmp_path).write(LOG_PROBS)
    for changed in (
        {"data": "x"},
        {"model.base": "x"},
        {"versions": {"torch": "2"}},
        {"dtype": "bfloat16"},
    ):
        other = cache_of(tmp_path, **changed)
        assert other.read(PAIRS, lambda line: None) is None
        other.write(LOG_PROBS)
    assert len(list(tmp_path.iterdir())) == 5


def test_the_order_of_the_inputs_does_not_count(tmp_path: Path) -> None:
    cache_of(tmp_path).write(LOG_PROBS)
    backwards = ReferenceCache(tmp_path, dict(reversed(INPUTS.items())))
    assert backwards.read(PAIRS, lambda line: None) is not None


@pytest.mark.parametrize(
    "damage", ["cut short", "empty", "not safetensors", "another name", "too few rows"]
)
def test_a_damaged_file_is_announced_and_replaced(damage: str, tmp_path: Path) -> None:
    cache_of(tmp_path).write(LOG_PROBS)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    break_file(file, damage)
    said: list[str] = []
    assert cache_of(tmp_path).read(PAIRS, said.append) is None
    (line,) = said
    assert line.startswith(f"the cached reference log-probs {file.name} are damaged (")
    cache_of(tmp_path).write(LOG_PROBS)
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
