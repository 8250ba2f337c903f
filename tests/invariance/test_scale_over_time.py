"""Invariance over the length of a run.

Runs are resumed on other workers, have dropout, faults or few pairs in a step, or take forty steps.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab import (
    ALONE,
    DPO,
    FULL,
    GRID,
    PLAIN,
    STEPS,
    STRATEGIES,
    TOLERANCE,
    Cell,
    Lab,
    MakeLab,
    largest,
)
from support import demo_pairs, layout_of, read_metrics, write_pairs

from orpo_ray.training.run_plan import plan_run, steps_of_run

pytestmark = pytest.mark.slow

UNCLIPPED: dict[str, Any] = {**FULL, "training": {"max_grad_norm": 0.0}}

# --- another number of workers at a resume --------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """A run in parts. Each part has its workers, its strategy, and the step that it stops at."""

    parts: tuple[tuple[int, str, int | None], ...]
    sections: dict[str, Any]
    steps: int


CHAINS = {
    "lora": Chain(
        ((2, "zero-2", 3), (1, "ddp", 5), (2, "zero-3", 7), (3, "zero-2", None)), PLAIN, STEPS
    ),
    "full": Chain(
        ((2, "zero-1", 2), (3, "zero-3", 3), (1, "ddp", 4), (3, "zero-2", 5), (2, "zero-3", None)),
        UNCLIPPED,
        6,
    ),
    "dpo": Chain(((2, "zero-2", 2), (1, "zero-3", 3), (2, "zero-0", None)), DPO, 5),
}


@pytest.fixture(scope="module")
def chains(make_lab: MakeLab) -> Lab:
    lab = make_lab()
    for name, chain in CHAINS.items():
        # The first start decides whether activations are recomputed, and later ones keep to it.
        training = {"gradient_checkpointing": "auto", **chain.sections.get("training", {})}
        sections = {**chain.sections, "training": training}
        lab.add(f"{name}-unbroken", steps=chain.steps, **sections)
        for workers, strategy, stop_at in chain.parts:
            lab.add(name, workers, strategy, stop_at=stop_at, steps=chain.steps, **sections)
    lab.run()
    return lab


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_resumes_under_another_strategy_and_number_of_workers(name: str, chains: Lab) -> None:
    chain = CHAINS[name]
    expected = chains.curves(f"{name}-unbroken")["train/loss"]
    assert len(set(expected[1:])) == len(expected[1:]) == chain.steps - 1, (
        "the first step only warms up"
    )
    assert largest(chains, f"{name}-unbroken", [name], besides=["train/grad_norm"]) < TOLERANCE
    assert largest(chains, f"{name}-unbroken", [name], only=["train/grad_norm"]) < 10 * TOLERANCE
    clipped_at = chain.sections.get("training", {}).get("max_grad_norm")
    if clipped_at is not None:
        assert max(chains.curves(name)["train/grad_norm"]) > max(clipped_at, 1.0)
    numbers = [line["step"] for line in read_metrics(chains.root / name) if "train/loss" in line]
    assert numbers == list(range(1, chain.steps + 1)), "each step once"
    workers, strategy, _ = chain.parts[-1]
    assert chains.result(name)["strategy"] == f"deepspeed-{strategy}"
    assert len(chains.result(name)["workers"]) == workers


@pytest.mark.parametrize("name", CHAINS)
def test_a_resumed_run_has_the_optimizer_state_of_an_unbroken_one(name: str, chains: Lab) -> None:
    steps = CHAINS[name].steps
    state, expected = chains.state(name, steps), chains.state(f"{name}-unbroken", steps)
    assert state.keys() == expected.keys()
    for key, tensor in state.items():
        assert tensor.shape == expected[key].shape, key
        if key.endswith("/step"):
            assert tensor.item() == steps
        elif not key.endswith("/master"):
            largest_value = expected[key].abs().max()
            assert (tensor - expected[key]).abs().max() <= 1e-4 * largest_value + 1e-9, key


@pytest.mark.parametrize("name", ["lora", "full"])
def test_some_sizes_do_not_divide_by_the_workers(name: str, chains: Lab) -> None:
    state = chains.state(name, CHAINS[name].steps)
    assert any(tensor.numel() % 3 for key, tensor in state.items() if key.endswith("/master"))


def test_the_reference_is_computed_once_for_the_whole_chain(chains: Lab) -> None:
    """The unbroken run shares it."""
    assert len(list((chains.root / "references").iterdir())) == 1
    assert chains.curves("dpo")["train/loss"][0] == pytest.approx(np.log(2), abs=1e-6)


# --- dropout --------------------------------------------------------------------------------------

DROPOUT = {**PLAIN, "adapter": {"dropout": 0.3}}


@pytest.fixture(scope="module")
def dropout(make_lab: MakeLab) -> Lab:
    lab = make_lab()
    for strategy in ("ddp", "zero-2"):
        lab.add(f"{strategy}-unbroken", 2, strategy, 3, steps=4, plant="note_dropout", **DROPOUT)
        for stop_at in (2, None):
            lab.add(strategy, 2, strategy, 3, steps=4, stop_at=stop_at, **DROPOUT)
    lab.add("without", 2, "ddp", 3, steps=4, plant="note_fetches", **PLAIN)
    lab.run()
    return lab


@pytest.mark.parametrize("strategy", ["ddp", "zero-2"])
def test_with_dropout_a_resume_on_as_many_workers_is_exact(strategy: str, dropout: Lab) -> None:
    for file in ("adapter/adapter_model.safetensors", "checkpoints/step-000004/state.safetensors"):
        assert (
            dropout.path(strategy, file).read_bytes()
            == dropout.path(f"{strategy}-unbroken", file).read_bytes()
        )
    assert dropout.curves(strategy) == dropout.curves(f"{strategy}-unbroken")
    assert largest(dropout, "without", [strategy]) > 1e-2, "there is no dropout"


@pytest.mark.parametrize("strategy", ["ddp", "zero-2"])
def test_each_rank_draws_its_own_dropout(strategy: str, dropout: Lab) -> None:
    masks = [
        tuple(mask) for rank in dropout.noted(f"{strategy}-unbroken", 2) for mask in rank.values()
    ]
    assert len(masks) == 2 * 4
    assert len(set(masks)) == len(masks), "a mask was drawn twice"


def test_the_base_is_fetched_once_per_server_and_not_loaded_before(dropout: Lab) -> None:
    """Both processes are on one server."""
    assert dropout.noted("without", 2) == [
        {"fetches": 1, "loads_too_early": 0},
        {"fetches": 0, "loads_too_early": 0},
    ]


def test_an_adapted_head_is_refused_under_zero_3(make_lab: MakeLab) -> None:
    lab = make_lab()
    adapter = {"targets": ["q_proj", "lm_head"]}
    lab.add("head", 2, "zero-3", steps=2, **PLAIN, adapter=adapter)
    lab.run(may_fail=["head"])
    (raised,) = lab.raised["head"]
    assert all(
        text.startswith("ConfigError: adapter.targets: an adapted or quantised head")
        for text in raised
    )


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "strategy"),
    [
        *(("gradient_is_nan", strategy) for strategy in STRATEGIES),
        *(("loss_is_nan", strategy) for strategy in ("ddp", "zero-3")),
        *(
            pytest.param("loss_is_nan", f"zero-{stage}", marks=pytest.mark.long)
            for stage in (0, 1, 2)
        ),
    ],
)
def test_a_number_that_is_not_finite_on_one_rank_ends_the_run_on_all(
    fault: str, strategy: str, make_lab: MakeLab
) -> None:
    lab, name = make_lab(), f"{fault}-{strategy}"
    lab.add(name, 2, strategy, 3, steps=4, plant=fault, **PLAIN, training={"checkpoint_every": 1})
    lab.run(may_fail=[name])
    config = lab.config(name, 2, strategy, 3, steps=4, **PLAIN)
    third = steps_of_run(config, len(lab.artifact.train))[2]
    pairs = ", ".join(lab.artifact.train.pair_ids[index] for index in third)
    ((first, second),) = lab.raised[name]
    what = "loss|gradient" if fault == "loss_is_nan" else "gradient"
    for raised in (first, second):
        assert raised.startswith("NonFiniteError: the ")
        assert raised.split()[2] in what.split("|")
        assert " of step 3 is not finite; no weight was changed by it." in raised
        assert f"Its pairs: {pairs}." in raised
    assert [folder.name for folder in sorted(lab.path(name, "checkpoints").iterdir())] == [
        "step-000001",
        "step-000002",
    ]
    assert lab.curves(name)["steps"] == [0, 1, 2]
    for noted in lab.noted(name, 2):
        assert noted["same_names"]
        assert noted["compared"] > 4 * 28 / 2
        assert noted["changed"] == []


# --- fewer pairs than workers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategies",
    [("ddp", "zero-3"), pytest.param(("zero-0", "zero-1", "zero-2"), marks=pytest.mark.long)],
)
def test_a_step_with_fewer_pairs_than_workers_is_as_on_one_worker(
    strategies: tuple[str, ...], make_lab: MakeLab, tmp_path: Path
) -> None:
    few = write_pairs(tmp_path, demo_pairs("train", 8), demo_pairs("h1", 2))
    lab = make_lab(artifact=few)
    options = {**PLAIN, "steps": 4, "training": {"pairs_per_step": 6, "eval_every": 2}}
    lab.add("alone", **options)
    names = [lab.add(strategy, 3, strategy, **options) for strategy in strategies]
    config = lab.config("unused", 3, **options)
    steps = plan_run(config, few.train, 3, config.training.tokens_per_microbatch, layout_of(config))
    assert [len(step.pairs) for step in steps] == [6, 2, 6, 2]
    assert [sorted(pack.weight for rank in step.packs for pack in rank) for step in steps[:2]] == [
        [1, 1, 1],
        [0, 1, 1],
    ]
    lab.run()
    # Evaluations are means over only two pairs, so the rounding of one of them shows.
    assert largest(lab, "alone", names) < 5 * TOLERANCE


# --- TRL inside -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        {"kind": "orpo", "nll_on": "full"},
        pytest.param({"kind": "dpo"}, marks=pytest.mark.long),
        pytest.param({"kind": "kto"}, marks=pytest.mark.long),
    ],
)
def test_trl_trains_if_workers_have_packs_of_different_sizes(
    objective: dict[str, Any], make_lab: MakeLab
) -> None:
    """Two workers share seven pairs, and two in the last step.

    TRL gathers tensors for its metrics, and these must have the same size on all workers.
    """
    lab = make_lab()
    options = {
        **PLAIN,
        "objective": objective,
        "training": {"engine": "trl", "pairs_per_step": 7},
        "steps": 4,
    }
    names = [lab.add(strategy, 2, strategy, **options) for strategy in ("ddp", "zero-2")]
    is_one_curve = objective["kind"] == "dpo"  # its loss is a mean over pairs, not over packs
    if is_one_curve:
        lab.add("alone", **options)
    lab.run()
    assert largest(lab, names[0], names[1:]) < 2 * TOLERANCE
    if is_one_curve:
        assert largest(lab, "alone", names) < 2 * TOLERANCE


# --- forty steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "cells"),
    [
        pytest.param("none", [ALONE, Cell(2, 3, "ddp")], id="none"),
        pytest.param("nf4", [ALONE, Cell(2, 3, "zero-2")], id="nf4", marks=pytest.mark.long),
        pytest.param("none", GRID, id="none-whole", marks=pytest.mark.long),
        pytest.param("nf4", GRID, id="nf4-whole", marks=pytest.mark.long),
    ],
)
def test_the_curve_is_still_one_after_forty_steps(
    quantization: str, cells: list[Cell], make_lab: MakeLab
) -> None:
    """Differences by the order of additions have more steps to grow in than in the other tests."""
    lab = make_lab()
    options = {
        "model": {"quantization": quantization},
        "training": {"eval_every": 20},
        "plant": "count_updates",
    }
    alone, *names = lab.add_cells(cells, steps=40, **options)
    lab.run()
    losses = lab.curves(alone)["train/loss"]
    assert len(losses) == 40
    assert losses[0] - losses[-1] > 0.3
    assert largest(lab, alone, names) < TOLERANCE
    for cell in cells:
        lab.check_float32(str(cell), cell.workers, 40)
