"""Optimizers, rates and starts give one curve, whatever the workers, also after a resume."""

from dataclasses import dataclass
from typing import Any

import pytest
from lab import FULL, PLAIN, TOLERANCE, Lab, MakeLab, largest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STEPS = 6
DDP_TWICE = ((2, "ddp", 2), (1, "ddp", 4), (2, "ddp", None))
ALSO_ZERO = ((2, "zero-2", 2), (1, "ddp", 4), (2, "zero-3", None))


@dataclass(frozen=True)
class Chain:
    """A run in parts. Each part has its workers, its strategy, and the step that it stops at."""

    sections: dict[str, Any]
    parts: tuple[tuple[int, str, int | None], ...] = DDP_TWICE
    tolerance: float = TOLERANCE


def optimizer(name: str, **training: Any) -> dict[str, Any]:
    return {"training": {"optimizer": name, "max_grad_norm": 0.0, **training}}


CHAINS = {
    "lora-plus": Chain({**PLAIN, "adapter": {"lora_plus_ratio": 4, "rslora": True}}, ALSO_ZERO),
    "schedule-free": Chain(
        {**PLAIN, **optimizer("schedule-free-adamw", schedule="constant")},
        ((2, "ddp", 2), (1, "ddp", 4), (2, "zero-0", None)),
    ),
    # The directions that GaLore finds in a gradient differ more than the gradient does.
    "galore": Chain(
        {**FULL, **optimizer("galore-adamw", galore={"rank": 16, "update_every": 3})},
        tolerance=10 * TOLERANCE,
    ),
    # 8-bit state may round to the neighbouring code.
    "ademamix-8bit": Chain(
        {**PLAIN, "adapter": {"r": 32}, **optimizer("ademamix-8bit")}, tolerance=5 * TOLERANCE
    ),
    "pissa": Chain({**PLAIN, "adapter": {"init": "pissa"}}, ALSO_ZERO),
    "loftq": Chain({"adapter": {"init": "loftq"}}, ALSO_ZERO),
    "eva": Chain({**PLAIN, "adapter": {"init": "eva"}}),
}


@pytest.fixture(scope="module")
def chains(make_lab: MakeLab) -> Lab:
    lab = make_lab()
    for name, chain in CHAINS.items():
        lab.add(f"{name}-unbroken", steps=STEPS, **chain.sections)
        for workers, strategy, stop_at in chain.parts:
            lab.add(name, workers, strategy, stop_at=stop_at, steps=STEPS, **chain.sections)
    lab.run()
    return lab


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_on_other_workers_goes_on_as_it_was(name: str, chains: Lab) -> None:
    losses = chains.curves(f"{name}-unbroken")["train/loss"]
    assert len(set(losses)) >= STEPS - 1 and losses[0] - losses[-1] > 0.02
    tolerance = CHAINS[name].tolerance
    assert largest(chains, f"{name}-unbroken", [name], besides=["train/grad_norm"]) < tolerance
    assert largest(chains, f"{name}-unbroken", [name], only=["train/grad_norm"]) < 10 * tolerance
    assert len(chains.result(name)["workers"]) == 2


@pytest.mark.parametrize("name", CHAINS)
def test_its_state_has_the_names_and_shapes_of_one_worker(name: str, chains: Lab) -> None:
    state, expected = chains.state(name, STEPS), chains.state(f"{name}-unbroken", STEPS)
    assert {key: tensor.shape for key, tensor in state.items()} == {
        key: tensor.shape for key, tensor in expected.items()
    }


def test_b_has_its_rate_under_every_strategy(chains: Lab) -> None:
    """DeepSpeed drops empty groups of parameters, and the rates must stay with theirs."""
    curves = chains.curves("lora-plus")
    rates = zip(curves["train/learning_rate"], curves["train/learning_rate_b"], strict=True)
    assert all(b == pytest.approx(4 * a) for a, b in rates)
    assert max(curves["train/learning_rate"]) > 0


def test_the_saved_adapter_has_the_rank_of_its_config_or_twice_that(chains: Lab) -> None:
    for name, rank in (("pissa", 16), ("loftq", 8), ("eva", 8)):
        adapter = load_file(chains.path(name, "adapter/adapter_model.safetensors"))
        assert {min(tensor.shape) for tensor in adapter.values()} == {rank}
