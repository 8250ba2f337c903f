"""Number of workers, packs and strategy change nothing but speed: one curve, however it is computed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab import ALONE, DPO, EVAL, FULL, GRID, IN_STAGE_0, PLAIN, STEPS, STRATEGIES, TOLERANCE, Lab, largest
from safetensors.torch import load_file
from support import BASE, demo_pairs, train_locally, write_pairs
from transformers import AutoModelForCausalLM

from orpo_ray.training.plan import PACKED, PADDED

pytestmark = pytest.mark.slow

BFLOAT16: dict[str, Any] = {"model": {"quantization": "none", "dtype": "bfloat16"}}

# --- one curve ------------------------------------------------------------------------------------------------------

OTHER_LAYOUTS = [
    (workers, strategy, layout)
    for layout in (PADDED, PACKED)
    for workers, strategy in ((1, "ddp"), (2, "ddp"), (2, "zero-2"), (2, "zero-3"))
]
CLIPPED = {"max_grad_norm": 0.3}
"""Below the gradient norm of most steps, so that clipping must be the same everywhere too."""


@pytest.fixture(scope="module")
def grid(make_lab: Callable[[], Lab]) -> Lab:
    """All of the grid, counted; and runs that must differ."""
    lab = make_lab()
    options = {**PLAIN, "training": CLIPPED}
    lab.add_grid(plant="count_updates", **options)
    lab.add(IN_STAGE_0, 2, "zero-0", 3, plant="count_updates", **options)
    for workers, strategy, layout in OTHER_LAYOUTS:
        own = {**PLAIN, "training": {**CLIPPED, "layout": layout}}
        lab.add(f"{layout}-{workers}-{strategy}", workers, strategy, 3, plant="count_updates", **own)
    lab.add("other-rate", 2, "zero-2", 3, **PLAIN, training={**CLIPPED, "learning_rate": 1.001e-3})
    for plant, strategy in (("update_at_every_pack", "zero-2"), ("reduce_at_every_pack", "ddp")):
        lab.add(plant, 2, strategy, 3, plant=plant, **options)
    lab.run()
    return lab


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_curve_is_that_of_one_process_alone(strategy: str, grid: Lab) -> None:
    """Loss, gradient norm and every other metric; the reference has no process group and no wrapper."""
    trained = train_locally(grid.config("alone", **PLAIN, training=CLIPPED), grid.artifact)
    assert trained.result["strategy"] == "single-process"
    names = [f"{w}x{p}-{strategy}" for w in (1, 2) for p in (1, 3) if grid.path(f"{w}x{p}-{strategy}", "").exists()]
    assert len(names) == (1 if strategy == "zero-0" else 4)
    for name in names:
        assert grid.result(name)["strategy"] == strategy.replace("zero", "deepspeed-zero")
        assert len(grid.result(name)["workers"]) == len(set(grid.result(name)["workers"])) == int(name[0])
    curves = grid.curves("alone")
    assert curves["steps"] == [0, *range(1, 6), 5, *range(6, 11), 10]
    assert {"train/loss", "train/grad_norm", "eval/margin", "eval/nll"} <= curves.keys()
    assert sum(norm > 0.3 for norm in curves["train/grad_norm"]) > STEPS / 2, "nothing is clipped"
    assert curves["train/loss"][0] - curves["train/loss"][-1] > 0.05, "nothing is learned"
    assert largest(grid, "alone", names) < TOLERANCE


@pytest.mark.parametrize(("workers", "strategy", "layout"), OTHER_LAYOUTS)
def test_the_curve_is_that_of_every_layout(workers: int, strategy: str, layout: str, grid: Lab) -> None:
    name = f"{layout}-{workers}-{strategy}"
    assert (grid.result(ALONE)["layout"], grid.result(name)["layout"]) == ("shared-prefix", layout)
    assert grid.noted(name, workers)[0]["packs"] == 3 * STEPS
    assert largest(grid, ALONE, [name]) < TOLERANCE


def test_the_comparison_would_notice_a_rate_that_is_a_thousandth_off(grid: Lab) -> None:
    assert largest(grid, ALONE, ["other-rate"]) > 10 * TOLERANCE


def test_the_trained_weights_are_the_same_too(grid: Lab) -> None:
    expected = load_file(grid.path(ALONE, "adapter/adapter_model.safetensors"))
    for workers, packs, strategy in GRID:
        found = load_file(grid.path(f"{workers}x{packs}-{strategy}", "adapter/adapter_model.safetensors"))
        assert found.keys() == expected.keys()
        assert max((found[name] - expected[name]).abs().max().item() for name in expected) < 1e-4, (workers, strategy)
    assert any((tensor.abs().max() > 1e-3) for name, tensor in expected.items() if "lora_B" in name)


@pytest.mark.parametrize(("workers", "packs", "strategy"), [*GRID, (2, 3, "zero-0")])
def test_a_step_is_one_optimizer_step_and_one_reduction(grid: Lab, workers: int, packs: int, strategy: str) -> None:
    name = f"{workers}x{packs}-{strategy}"
    for counts in grid.noted(name, workers):
        assert (counts["steps"], counts["packs"]) == (STEPS, STEPS * packs)
        assert counts["updates"] == STEPS
        if workers > 1:  # alone there is nothing to reduce, and accelerate does not hold it back
            assert counts["reductions"] == (STEPS if strategy == "ddp" else 0)
    counted = [tensor.item() for key, tensor in grid.state(name).items() if key.endswith("/step")]
    assert set(counted) == {STEPS}, "as Adam counts"


def test_the_counts_would_notice_a_sync_at_every_pack(grid: Lab) -> None:
    """And an update a pack changes the curve, while a reduction a pack only costs traffic."""
    assert [counts["updates"] for counts in grid.noted("update_at_every_pack", 2)] == [3 * STEPS] * 2
    assert largest(grid, ALONE, ["update_at_every_pack"]) > 1e-2
    assert [counts["reductions"] for counts in grid.noted("reduce_at_every_pack", 2)] == [3 * STEPS] * 2
    assert largest(grid, ALONE, ["reduce_at_every_pack"]) < TOLERANCE


# --- formats and kinds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What is trained in which format, and under which strategies beside one worker."""

    sections: dict[str, Any]
    strategies: tuple[str, ...]
    steps: int = 5


KINDS = {
    "nf4": Kind({}, ("ddp", "zero-1", "zero-2", "zero-3"), steps=STEPS),
    "bfloat16": Kind(BFLOAT16, STRATEGIES),
    "dora": Kind({**PLAIN, "adapter": {"dora": True}}, ("ddp", "zero-2", "zero-3")),
    "full": Kind(FULL, ("ddp", "zero-1", "zero-2", "zero-3")),
    # At this rank the matrices are large enough for bitsandbytes to keep 8-bit state.
    "adamw-8bit": Kind({**PLAIN, "adapter": {"r": 32}, "training": {"optimizer": "adamw-8bit"}}, ("ddp", "zero-0")),
    "int8": Kind({"model": {"quantization": "int8"}}, ("ddp", "zero-2")),
    "trl": Kind({**DPO, "training": {**DPO["training"], "engine": "trl"}}, ("ddp", "zero-0", "zero-2", "zero-3")),
    # Its baseline is a mean over a pack, so that it has no one curve.
    "kto": Kind({**PLAIN, "objective": {"kind": "kto", "beta": 0.5}, "training": {"engine": "trl"}}, ("ddp", "zero-2")),
}


@pytest.fixture(scope="module")
def kinds(make_lab: Callable[[], Lab]) -> Lab:
    """Each kind with one worker, and with two workers and three packs under its strategies."""
    lab = make_lab()
    for name, kind in KINDS.items():
        options = {"steps": kind.steps, "plant": "count_updates", **kind.sections}
        lab.add(name, **options)
        for strategy in kind.strategies:
            lab.add(f"{name}-{strategy}", 2, strategy, 3, **options)
    lab.run()
    return lab


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(kind: str, kinds: Lab) -> None:
    losses = kinds.curves(kind)["train/loss"]
    assert len(losses) == KINDS[kind].steps
    assert abs(losses[0] - losses[-1]) > 0.05


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"full", "bfloat16", "kto"}))
def test_every_kind_has_one_curve(kind: str, kinds: Lab) -> None:
    names = [f"{kind}-{strategy}" for strategy in KINDS[kind].strategies]
    # DPO's gradient norms, which TRL's head sums up in tiles that depend on the pack.
    assert largest(kinds, kind, names) < (2 * TOLERANCE if kind == "trl" else TOLERANCE)


def test_a_whole_model_has_one_curve(kinds: Lab) -> None:
    """The norm of so many gradients is a sum of as many float32 numbers, which ZeRO adds in another order."""
    names = [f"full-{strategy}" for strategy in KINDS["full"].strategies]
    assert largest(kinds, "full", names, besides=["train/grad_norm"]) < TOLERANCE
    assert largest(kinds, "full", names, only=["train/grad_norm"]) < 10 * TOLERANCE
    assert max(kinds.curves("full")["train/grad_norm"]) > 1, "nothing is clipped"


def test_losses_in_bfloat16_agree_within_a_thousandth(tmp_path: Path) -> None:
    """A weight that differs by 1e-8 may round to another bfloat16 number, so a loss is the mean of many pairs here."""
    lab = Lab(tmp_path, BASE, write_pairs(tmp_path, demo_pairs("train", 36), demo_pairs("h1", EVAL)))
    options = {**BFLOAT16, "training": {"pairs_per_step": 36}}
    reference, *names = lab.add_grid(**options)
    names.append(lab.add(IN_STAGE_0, 2, "zero-0", 3, **options))
    lab.run()
    assert largest(lab, reference, names, only=["train/loss"]) < 1e-3
    losses = lab.curves(reference)["train/loss"]
    assert abs(losses[0] - losses[-1]) > 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_float32_under_every_strategy(kind: str, kinds: Lab) -> None:
    for strategy in KINDS[kind].strategies:
        name = f"{kind}-{strategy}"
        assert [counts["formats"] for counts in kinds.noted(name, 2)] == [["torch.float32"]] * 2, name
        state = kinds.state(name, KINDS[kind].steps)
        assert {tensor.dtype for key, tensor in state.items() if key.endswith("/master")} == {torch.float32}
        (weights,) = kinds.path(name, "adapter").glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float32}, name


def test_8_bit_state_is_8_bit_under_deepspeed_too(kinds: Lab) -> None:
    for strategy in KINDS["adamw-8bit"].strategies:
        state = kinds.state(f"adamw-8bit-{strategy}", KINDS["adamw-8bit"].steps)
        assert {tensor.dtype for key, tensor in state.items() if key.endswith("state1")} == {torch.uint8}


@pytest.mark.parametrize("strategy", KINDS["full"].strategies)
def test_a_whole_model_is_saved_whole_and_judges_as_was_reported(strategy: str, kinds: Lab) -> None:
    name = f"full-{strategy}"
    model = AutoModelForCausalLM.from_pretrained(kinds.path(name, "adapter"))
    shapes = {
        key: tensor.shape for key, tensor in AutoModelForCausalLM.from_pretrained(kinds.base).state_dict().items()
    }
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes
    means = [mean_log_prob(model, pair.prompt, pair.chosen) for pair in kinds.artifact.eval]
    reported = kinds.result(name)["metrics"]["eval/chosen_logp"]
    assert reported == pytest.approx(np.mean(means), rel=1e-5)
    assert reported != pytest.approx(kinds.curves(name)["eval/chosen_logp"][0], rel=1e-3), "nothing is learned"


@torch.no_grad()
def mean_log_prob(model: torch.nn.Module, prompt: np.ndarray, answer: np.ndarray) -> float:
    """Log-prob per token of an answer from full logits."""
    ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
    log_probs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return log_probs[len(prompt) - 1 : -1].gather(-1, ids[len(prompt) :, None]).mean().item()
