"""The number of workers, packs and strategy change the speed of a run, but not its curve."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab import (
    ALONE,
    DPO,
    EVAL,
    FULL,
    GRID,
    PLAIN,
    STEPS,
    TOLERANCE,
    Cell,
    Lab,
    MakeLab,
    largest,
)
from safetensors.torch import load_file
from support import demo_pairs, train_locally, write_pairs
from transformers import AutoModelForCausalLM

from orpo_ray.runs.samples import samples_of
from orpo_ray.training.plan import PACKED, PADDED

pytestmark = pytest.mark.slow

BFLOAT16: dict[str, Any] = {"model": {"quantization": "none", "dtype": "bfloat16"}}

# --- one curve ------------------------------------------------------------------------------------

OTHER_LAYOUTS = [
    Cell(workers, 3, strategy, layout)
    for layout in (PADDED, PACKED)
    for workers, strategy in ((1, "ddp"), (2, "ddp"), (2, "zero-2"), (2, "zero-3"))
]
PAIRWISE = [
    ALONE,
    Cell(2, 3, "ddp"),
    Cell(2, 3, "zero-0"),
    Cell(1, 3, "zero-1"),
    Cell(2, 1, "zero-1"),
    Cell(2, 3, "zero-2"),
    Cell(2, 1, "zero-3"),
    Cell(1, 3, "ddp", PADDED),
    Cell(2, 3, "zero-2", PADDED),
    Cell(1, 3, "zero-3", PADDED),
    Cell(2, 3, "ddp", PACKED),
    Cell(1, 1, "zero-2", PACKED),
    Cell(1, 1, "zero-3", PACKED),
]
"""A smaller grid with every pair of values of two fields that the whole grid has."""
CLIPPED = {"max_grad_norm": 0.3}
"""The limit is below the gradient norm of most steps, so clipping must be the same everywhere."""


def test_the_smaller_grid_has_every_pair_of_the_whole() -> None:
    whole, found = (
        {(i, j, cell[i], cell[j]) for cell in cells for i in range(4) for j in range(i)}
        for cells in ([*GRID, *OTHER_LAYOUTS], PAIRWISE)
    )
    assert whole <= found


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(PAIRWISE, id="pairwise"),
        pytest.param([*GRID, *OTHER_LAYOUTS], id="whole", marks=pytest.mark.long),
    ],
)
def grid(request: pytest.FixtureRequest, make_lab: MakeLab) -> Lab:
    """A run in every cell, with its counts, and runs that must differ."""
    lab = make_lab()
    options = {**PLAIN, "training": CLIPPED}
    lab.add_cells(request.param, plant="count_updates", **options)
    lab.add("other-rate", 2, "zero-2", 3, **PLAIN, training={**CLIPPED, "learning_rate": 1.001e-3})
    for plant, strategy in (("update_at_every_pack", "zero-2"), ("reduce_at_every_pack", "ddp")):
        lab.add(plant, 2, strategy, 3, plant=plant, **options)
    lab.run()
    return lab


def test_the_curve_is_that_of_one_process_alone(grid: Lab) -> None:
    """All metrics are compared with a run that has no process group and no wrapper."""
    trained = train_locally(grid.config("alone", **PLAIN, training=CLIPPED), grid.artifact)
    assert trained.result["strategy"] == "single-process"
    for cell in grid.cells:
        result = grid.result(str(cell))
        assert result["strategy"] == cell.strategy.replace("zero", "deepspeed-zero")
        assert result["layout"] == ("shared-prefix" if cell.layout == "auto" else cell.layout)
        assert len(result["workers"]) == len(set(result["workers"])) == cell.workers
    curves = grid.curves("alone")
    assert curves["steps"] == [0, *range(1, 6), 5, *range(6, 11), 10]
    assert {"train/loss", "train/grad_norm", "eval/margin", "eval/nll"} <= curves.keys()
    assert sum(norm > 0.3 for norm in curves["train/grad_norm"]) > STEPS / 2, "nothing is clipped"
    assert curves["train/loss"][0] - curves["train/loss"][-1] > 0.05, "nothing is learned"
    assert largest(grid, "alone", map(str, grid.cells)) < TOLERANCE


def test_the_comparison_would_notice_a_rate_that_is_a_thousandth_off(grid: Lab) -> None:
    assert largest(grid, str(ALONE), ["other-rate"]) > 100 * TOLERANCE


def test_the_trained_weights_are_the_same_too(grid: Lab) -> None:
    expected = load_file(grid.path(str(ALONE), "adapter/adapter_model.safetensors"))
    for cell in grid.cells:
        found = load_file(grid.path(str(cell), "adapter/adapter_model.safetensors"))
        assert found.keys() == expected.keys()
        assert max((found[name] - expected[name]).abs().max().item() for name in expected) < 1e-4, (
            str(cell)
        )
    assert any((tensor.abs().max() > 1e-3) for name, tensor in expected.items() if "lora_B" in name)


def test_samples_are_those_of_one_worker_unless_weights_are_shared_out(grid: Lab) -> None:
    expected = samples_of(grid.root / str(ALONE))
    assert [sample.step for sample in expected] == [0] * 3 + [5] * 3 + [10] * 3
    for cell in grid.cells:
        found = samples_of(grid.root / str(cell))
        if cell.strategy == "zero-3":
            assert found == [], str(cell)
        else:
            assert found[:3] == expected[:3], str(cell)
            assert len(found) == len(expected), str(cell)


def test_a_step_is_one_optimizer_step_and_one_reduction(grid: Lab) -> None:
    for cell in grid.cells:
        for counts in grid.noted(str(cell), cell.workers):
            assert (counts["steps"], counts["packs"]) == (STEPS, STEPS * cell.packs), str(cell)
            assert counts["updates"] == STEPS, str(cell)
            # With one worker there is nothing to reduce, and accelerate does not hold it back.
            if cell.workers > 1:
                assert counts["reductions"] == (STEPS if cell.strategy == "ddp" else 0), str(cell)
        counted = [
            tensor.item() for key, tensor in grid.state(str(cell)).items() if key.endswith("/step")
        ]
        assert set(counted) == {STEPS}, f"as Adam counts in {cell}"


def test_the_counts_would_notice_a_sync_at_every_pack(grid: Lab) -> None:
    """An update at every pack changes the curve. A reduction at every pack costs only traffic."""
    assert [counts["updates"] for counts in grid.noted("update_at_every_pack", 2)] == [
        3 * STEPS
    ] * 2
    assert largest(grid, str(ALONE), ["update_at_every_pack"]) > 1e-2
    assert [counts["reductions"] for counts in grid.noted("reduce_at_every_pack", 2)] == [
        3 * STEPS
    ] * 2
    assert largest(grid, str(ALONE), ["reduce_at_every_pack"]) < TOLERANCE


# --- formats and kinds ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What is trained, and the strategies that are compared with one worker."""

    sections: dict[str, Any]
    strategies: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()
    """Strategies that are only tested here by `make test-long`."""


KINDS = {
    "nf4": Kind({}, ("ddp", "zero-3"), ("zero-1", "zero-2")),
    "dora": Kind({**PLAIN, "adapter": {"dora": True}}, ("zero-3",), ("ddp", "zero-2")),
    "full": Kind(FULL, ("ddp", "zero-3"), ("zero-1", "zero-2")),
    # With this rank the matrices are large enough for bitsandbytes to keep 8-bit state.
    "adamw-8bit": Kind(
        {**PLAIN, "adapter": {"r": 32}, "training": {"optimizer": "adamw-8bit"}},
        ("zero-0",),
        ("ddp",),
    ),
    "int8": Kind({"model": {"quantization": "int8"}}, ("zero-2",), ("ddp",)),
    "trl": Kind(
        {**DPO, "training": {**DPO["training"], "engine": "trl"}},
        ("zero-3",),
        ("ddp", "zero-0", "zero-2"),
    ),
    # KTO's baseline is a mean over a pack, so its curve depends on the packs.
    "kto": Kind(
        {**PLAIN, "objective": {"kind": "kto", "beta": 0.5}, "training": {"engine": "trl"}},
        ("zero-2",),
        ("ddp",),
    ),
}
KIND_STEPS = 5


@pytest.fixture(scope="module", params=["pairwise", pytest.param("whole", marks=pytest.mark.long)])
def kinds(request: pytest.FixtureRequest, make_lab: MakeLab) -> Lab:
    """Each kind with one worker, and with two workers and three packs under its strategies."""
    lab = make_lab()
    for name, kind in KINDS.items():
        options = {"steps": KIND_STEPS, "plant": "count_updates", **kind.sections}
        lab.add(name, **options)
        for strategy in kind.strategies + (kind.elsewhere if request.param == "whole" else ()):
            lab.add(f"{name}-{strategy}", 2, strategy, 3, **options)
    lab.run()
    return lab


def runs_of(kind: str, lab: Lab) -> list[str]:
    """The names of a kind's runs with two workers."""
    return [name for name in lab.raised if name.startswith(f"{kind}-")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(kind: str, kinds: Lab) -> None:
    losses = kinds.curves(kind)["train/loss"]
    assert len(losses) == KIND_STEPS
    assert abs(losses[0] - losses[-1]) > 0.05


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"full", "trl", "kto"}))
def test_every_kind_has_one_curve(kind: str, kinds: Lab) -> None:
    # 8-bit state may round to the neighbouring code. That moves a weight more than another order
    # of additions does.
    tolerance = 5 * TOLERANCE if kind == "adamw-8bit" else TOLERANCE
    assert largest(kinds, kind, runs_of(kind, kinds)) < tolerance


@pytest.mark.parametrize("kind", ["full", "trl"])
def test_kinds_whose_gradient_norms_are_summed_in_another_order_have_one_curve(
    kind: str, kinds: Lab
) -> None:
    """The norm of a whole model is a sum of very many numbers, in another order under ZeRO.

    TRL's head adds in tiles.
    """
    names = runs_of(kind, kinds)
    assert largest(kinds, kind, names, besides=["train/grad_norm"]) < TOLERANCE
    assert largest(kinds, kind, names, only=["train/grad_norm"]) < 10 * TOLERANCE
    clipped_at = KINDS[kind].sections.get("training", {}).get("max_grad_norm", 1.0)
    assert max(kinds.curves(kind)["train/grad_norm"]) > clipped_at, "nothing is clipped"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_float32_under_every_strategy(kind: str, kinds: Lab) -> None:
    for name in runs_of(kind, kinds):
        kinds.check_float32(name, 2, KIND_STEPS)


@pytest.mark.parametrize(
    ("cells", "steps"),
    [
        pytest.param(
            [ALONE, *(Cell(2, 3, strategy) for strategy in ("ddp", "zero-3"))],
            KIND_STEPS,
            id="two-strategies",
        ),
        pytest.param(GRID, STEPS, id="whole", marks=pytest.mark.long),
    ],
)
def test_losses_in_bfloat16_agree_within_a_thousandth(
    cells: list[Cell], steps: int, make_lab: MakeLab, tmp_path: Path
) -> None:
    """A weight that differs by 1e-8 may round to another bfloat16 number.

    So the losses here are means over many pairs.
    """
    lab = make_lab(artifact=write_pairs(tmp_path, demo_pairs("train", 36), demo_pairs("h1", EVAL)))
    options = {
        **BFLOAT16,
        "training": {"pairs_per_step": 36},
        "plant": "count_updates",
        "steps": steps,
    }
    reference, *names = lab.add_cells(cells, **options)
    lab.run()
    assert largest(lab, reference, names, only=["train/loss"]) < 1e-3
    losses = lab.curves(reference)["train/loss"]
    assert abs(losses[0] - losses[-1]) > 0.03
    for cell in cells:
        lab.check_float32(str(cell), cell.workers, steps)


def test_8_bit_state_is_8_bit_under_deepspeed_too(kinds: Lab) -> None:
    for name in runs_of("adamw-8bit", kinds):
        state = kinds.state(name, KIND_STEPS)
        assert {tensor.dtype for key, tensor in state.items() if key.endswith("state1")} == {
            torch.uint8
        }


def test_a_whole_model_is_saved_whole_and_has_the_reported_log_probs(kinds: Lab) -> None:
    expected = AutoModelForCausalLM.from_pretrained(kinds.base).state_dict()
    for name in runs_of("full", kinds):
        model = AutoModelForCausalLM.from_pretrained(kinds.path(name, "adapter"))
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        assert shapes == {key: tensor.shape for key, tensor in expected.items()}
        means = [mean_log_prob(model, pair.prompt, pair.chosen) for pair in kinds.artifact.eval]
        reported = kinds.result(name)["metrics"]["eval/chosen_logp"]
        assert reported == pytest.approx(np.mean(means), rel=1e-5)
        assert reported != pytest.approx(kinds.curves(name)["eval/chosen_logp"][0], rel=1e-3), (
            "nothing is learned"
        )


@torch.no_grad()
def mean_log_prob(model: torch.nn.Module, prompt: np.ndarray, answer: np.ndarray) -> float:
    """The log-prob per token of an answer, from full logits."""
    ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
    log_probs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return log_probs[len(prompt) - 1 : -1].gather(-1, ids[len(prompt) :, None]).mean().item()
