"""The models and pairs of the benchmarks are what their names say."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import Linear4bit as LoraLinear4bit
from peft.tuners.lora import LoraLayer
from support import BASE

from orpo_ray.bench.models import BASES, quantised_base, small_llama, with_adapter
from orpo_ray.bench.pairs import pairs_of_file, pairs_of_shape
from orpo_ray.bench.step import Bench, Case, group_by_length
from orpo_ray.errors import DataError


@pytest.mark.parametrize("name", BASES)
def test_a_base_is_nf4_but_for_head_and_embedding(name: str) -> None:
    """The model has few layers here and is on a CPU, but is quantised as on a GPU."""
    model = quantised_base(name, "cpu", tiny=True)
    quantised = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(quantised) == 6 * 7
    assert all(
        module.weight.quant_type == "nf4" and module.weight.quant_state.nested
        for module in quantised
    )
    assert not isinstance(model.get_output_embeddings(), Linear4bit)
    adapted = with_adapter(model)
    with torch.no_grad():
        assert adapted(torch.arange(4, 20)[None]).logits.isfinite().all()
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    assert all(type(layer) is LoraLinear4bit for layer in layers)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert (
        len(layers) == 6 * 7
        and len(trained) == 6 * 7 * 2
        and all("lora_" in name for name in trained)
    )


def test_full_sizes_are_those_of_the_models_they_are_named_after() -> None:
    """Parameters of the layers and the head, by their own numbers, in billions.

    Gemma 3 4B has 4.30 with its part that sees images (0.42), which is left out here.
    """
    sizes = {"mistral-7b": 7.24, "llama-3-8b": 8.03, "gemma-3-4b": 3.88}
    assert sizes.keys() == BASES.keys()
    for name, billions in sizes.items():
        model_type, config_type, settings = BASES[name]
        with torch.device("meta"):
            model = model_type(config_type(**settings))
        assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(
            billions, abs=0.01
        )


def test_the_head_of_the_small_model_is_about_a_tenth_of_its_work() -> None:
    """Parameters count as multiplications a token.

    With checkpointing the layers are computed once more than the head.
    """
    model = small_llama(256, 1400)
    head = model.get_output_embeddings().weight.numel()
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert 0.05 < 2 * head / (3 * layers + 2 * head) < 0.12


def lengths_of(pairs: Any) -> np.ndarray:
    return np.array([[len(pair.prompt), len(pair.chosen), len(pair.rejected)] for pair in pairs])


def test_drawn_pairs_have_the_shape_or_lengths_around_it() -> None:
    assert (lengths_of(pairs_of_shape((7, 5, 3), 4, 0.0, 50)) == [7, 5, 3]).all()
    ragged = lengths_of(pairs_of_shape((100, 50, 50), 200, 0.8, 50))
    assert (ragged.min(axis=0) >= [20, 10, 10]).all() and (
        ragged.max(axis=0) <= [180, 90, 90]
    ).all()
    assert np.abs(ragged.mean(axis=0) / [100, 50, 50] - 1).max() < 0.1
    ids = np.concatenate([pair.prompt for pair in pairs_of_shape((100, 50, 50), 20, 0.8, 50)])
    assert ids.min() >= 4 and ids.max() < 50


def test_a_file_without_enough_pairs_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    read = partial(
        pairs_of_file,
        str(file),
        str(BASE),
        max_length=100,
        vocabulary=50,
        announce=lambda line: None,
    )
    (pair,) = read(count=1)
    assert max(pair.prompt.max(), pair.chosen.max()) < 50
    with pytest.raises(DataError, match="1 pairs fit into 100 tokens, but 2 are needed"):
        read(count=2)


def test_grouping_keeps_the_pairs_and_sorts_their_lengths() -> None:
    steps = [pairs_of_shape((20, 10, 10), 3, 0.8, 50, seed) for seed in range(4)]
    grouped = group_by_length(steps)
    assert sorted(id(pair) for step in grouped for pair in step) == sorted(
        id(pair) for step in steps for pair in step
    )
    totals = [
        len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
        for step in grouped
        for pair in step
    ]
    assert totals == sorted(totals) and [len(step) for step in grouped] == [3] * 4


def test_the_memory_of_a_side_does_not_depend_on_what_ran_before_it() -> None:
    bench = Bench(Case(shape=(12, 6, 9), pairs=2, hidden=64, vocabulary=60), lambda line: None)
    stock, ours = bench.stock(), bench.ours()
    measured = bench.measure([stock, ours, stock, ours], 1)
    first, second = ([each.memory for each in some] for some in (measured[:2], measured[2:]))
    assert first == pytest.approx(second, rel=1e-3)


def test_sides_of_a_benchmark_agree_on_a_step() -> None:
    bench = Bench(Case(shape=(12, 6, 9), pairs=2, hidden=64, vocabulary=60), lambda line: None)
    for ours in (bench.ours(), bench.ours(frozen_head=False)):
        loss, gradient = bench.differences(ours, bench.stock())
        assert loss < 1e-5 and gradient < 1e-4
    assert bench.ours(frozen_head=False).tokens == 4 * 2 * 27
