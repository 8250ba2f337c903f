"""What each optimizer is given, and what it does with it: by hand, or beside a plain reference."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from galore_torch import GaLoreAdamW8bit
from schedulefree import AdamWScheduleFree
from support import decided, run_config
from torch import Tensor, nn
from transformers import Trainer

from orpo_ray.config import RunConfig
from orpo_ray.config.optimizers import OPTIMIZERS
from orpo_ray.errors import ResourceError
from orpo_ray.training.arguments import training_arguments
from orpo_ray.training.optimizers import (
    averaged_weights,
    galore,
    is_averaging,
    lora_plus,
    trained_embeddings,
)
from orpo_ray.training.packages import refuse_missing_optimizer

RATE, STEPS = 0.01, 40
FULL: dict[str, Any] = {"model": {"quantization": "none"}, "adapter": {"kind": "none"}}


def configured(storage: Path, optimizer: str, **sections: Any) -> RunConfig:
    schedule = "constant" if optimizer.startswith("schedule-free") else "cosine"
    own = {"optimizer": optimizer, "learning_rate": RATE, "schedule": schedule, "warmup": 4}
    training = {**own, **sections.pop("training", {})}
    return run_config(storage, optimizer, **sections, training=training)


def arguments_of(config: RunConfig) -> Any:
    return training_arguments(config.training, config.run_dir, STEPS, decided(256))


def made(config: RunConfig, model: nn.Module) -> Any:
    """The optimizer of a config, without LoRA+ and GaLore."""
    trainer = Trainer(model=model, args=arguments_of(config))
    optimizer = trainer.create_optimizer()
    trainer.create_scheduler(STEPS)
    return optimizer


def in_blocks(name: str) -> bool:
    """Whether it is one of bitsandbytes' that keep 8 bits and run on a CPU."""
    return name.endswith("-8bit") and not name.startswith(("paged-", "galore-"))


def test_galores_8_bit_state_is_planned_in_8_bits() -> None:
    parameter = nn.Parameter(torch.zeros(256, 64))
    optimizer = GaLoreAdamW8bit([{"params": [parameter]}])
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    state = optimizer.state[parameter]
    size = sum(state[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2"))
    assert size == OPTIMIZERS["galore-adamw-8bit"].whole_bytes(parameter.numel(), 0)


class Layer(nn.Module):
    """One matrix, large enough for 8-bit state."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 128, bias=False)
        nn.init.zeros_(self.linear.weight)


def pushed(model: Layer, optimizer: Any, steps: int) -> Tensor:
    """The weight after steps with gradients from a seed."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        model.linear.weight.grad = torch.randn(128, 64, generator=generator)
        optimizer.step()
    return model.linear.weight.detach().clone()


class Table(nn.Module):
    """An embedding beside a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(256, 64), nn.Linear(64, 256, bias=False)


@pytest.mark.parametrize("name", ["adamw", *(name for name in OPTIMIZERS if in_blocks(name))])
def test_the_bytes_of_its_state_are_those_that_are_planned(name: str, tmp_path: Path) -> None:
    model, kind = Table(), OPTIMIZERS[name]
    optimizer = made(configured(tmp_path, name, **FULL), model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [each for state in optimizer.state.values() for each in state.values()]
    size = sum(each.nbytes for each in kept if isinstance(each, Tensor) and each.numel() > 1)
    tables = sum(each.numel() for each in trained_embeddings(model))
    # The 256 values that a byte may mean are kept beside it.
    assert size == pytest.approx(kind.whole_bytes(2 * tables, tables), abs=2 * 3 * 1024)


# --- what each is given ---------------------------------------------------------------------------


def test_lion_steps_by_the_sign_of_its_papers_average(tmp_path: Path) -> None:
    """arXiv:2302.06675: beta1 0.9 for the step, beta2 0.99 for what is kept."""
    model = Layer()
    optimizer = made(configured(tmp_path, "lion"), model)
    optimizer.param_groups[0]["lr"] = RATE
    found = pushed(model, optimizer, 3)
    generator, kept, weight = torch.Generator().manual_seed(0), 0.0, torch.zeros(128, 64)
    for _ in range(3):
        gradient = torch.randn(128, 64, generator=generator)
        weight -= RATE * (0.9 * kept + 0.1 * gradient).sign()
        kept = 0.99 * kept + 0.01 * gradient
    assert (found - weight).abs().max() < 1e-6


def test_ademamix_brings_its_slow_average_in_over_the_run(tmp_path: Path) -> None:
    """arXiv:2409.03137: alpha rises evenly, beta3 by its half-life, up to the last step."""
    model = Layer()
    optimizer = made(configured(tmp_path, "ademamix"), model)
    optimizer.param_groups[0]["lr"] = RATE
    found = pushed(model, optimizer, 3)
    generator, weight = torch.Generator().manual_seed(0), torch.zeros(128, 64)
    fast = slow = square = torch.zeros(128, 64)
    for step in (1, 2, 3):
        gradient = torch.randn(128, 64, generator=generator)
        low, high, share = math.log(0.9), math.log(0.9999), step / STEPS
        beta3 = math.exp(low * high / ((1 - share) * high + share * low))
        fast = 0.9 * fast + 0.1 * gradient
        slow = beta3 * slow + (1 - beta3) * gradient
        square = 0.999 * square + 0.001 * gradient**2
        scaled = (square / (1 - 0.999**step)).sqrt() + 1e-8
        weight -= RATE * (fast / (1 - 0.9**step) + 5 * share * slow) / scaled
    assert (found - weight).abs().max() < 1e-6


def test_schedule_free_warms_up_by_itself_and_has_no_other_schedule(tmp_path: Path) -> None:
    model = Layer()
    trainer = Trainer(model=model, args=arguments_of(configured(tmp_path, "schedule-free-adamw")))
    optimizer: Any = trainer.create_optimizer()
    schedule = trainer.create_scheduler(STEPS)
    assert isinstance(optimizer, AdamWScheduleFree) and is_averaging(optimizer)
    optimizer.train()
    rates = []
    for _ in range(6):
        pushed(model, optimizer, 1)
        schedule.step()
        rates.append(optimizer.param_groups[0]["scheduled_lr"])
    assert rates == pytest.approx([RATE * share for share in (0.25, 0.5, 0.75, 1, 1, 1)])


# --- weights for use ------------------------------------------------------------------------------


def test_the_weights_for_use_are_the_averages_and_training_goes_on_as_if_never_asked() -> None:
    """x = y + (1 - 1/beta1) (z - y), arXiv:2405.15682."""
    asked, alone = Layer(), Layer()
    optimizers = [AdamWScheduleFree(model.parameters(), lr=RATE) for model in (asked, alone)]
    for optimizer in optimizers:
        optimizer.train()
    before = pushed(asked, optimizers[0], 5)
    pushed(alone, optimizers[1], 5)
    weight = asked.linear.weight
    z = optimizers[0].state[weight]["z"]
    with averaged_weights(optimizers[0]):
        expected = before + (1 - 1 / 0.9) * (z - before)
        assert (weight - expected).abs().max() < 1e-7
        assert (weight - before).abs().max() > 1e-4
    assert torch.equal(weight, before)
    assert torch.equal(pushed(asked, optimizers[0], 3), pushed(alone, optimizers[1], 3))


def test_other_optimizers_train_the_weights_that_are_for_use() -> None:
    model = Layer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    before = pushed(model, optimizer, 1)
    with averaged_weights(optimizer):
        assert torch.equal(model.linear.weight, before)


# --- LoRA+ ----------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """Parameters with the names of an adapter with DoRA."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (
            ("lora_A", (4, 8)),
            ("lora_B", (8, 4)),
            ("lora_magnitude_vector", (8,)),
        ):
            part = nn.ParameterDict({"default": nn.Parameter(torch.ones(shape))})
            self.add_module(name, part)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "lion", "schedule-free-adamw"])
def test_b_has_a_multiple_of_the_rate_of_a(optimizer: str, tmp_path: Path) -> None:
    model = Adapted()
    config = configured(tmp_path, optimizer, training={"weight_decay": 0.1})
    args = arguments_of(config)
    found = lora_plus(model, args, Trainer.get_optimizer_cls_and_kwargs(args), 16.0)
    rates = {p: group["lr"] for group in found.param_groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    assert rates.pop(parameters["lora_A.default"]) == RATE
    assert rates.pop(parameters["lora_B.default"]) == pytest.approx(16 * RATE)
    assert rates.pop(parameters["lora_magnitude_vector.default"]) == pytest.approx(16 * RATE)
    assert not rates and all(group["params"] for group in found.param_groups)
    assert {group["weight_decay"] for group in found.param_groups} <= {0.0, 0.1}


# --- GaLore ---------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """An embedding, a body of two layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 64)
        self.body = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64, bias=False))
        self.head = nn.Linear(64, 10, bias=False)


def with_galore(config: RunConfig, model: Tiny) -> Any:
    args = arguments_of(config)
    trainer = Trainer(model=model, args=args)
    return galore(trainer.create_optimizer, args, model.body, model)


def test_galore_moves_the_linear_layers_of_the_body_in_few_directions(tmp_path: Path) -> None:
    model = Tiny()
    settings = {"rank": 4, "update_every": 2, "scale": 0.5}
    config = configured(tmp_path, "galore-adamw", **FULL, training={"galore": settings})
    optimizer = with_galore(config, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    projected = {"body.0.weight", "body.1.weight"}
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
        if step == 1:
            assert {name: torch.linalg.matrix_rank(moved[name]).item() for name in projected} == (
                dict.fromkeys(projected, 4)
            ), "both steps went in the same four directions"
    for name in projected:
        assert torch.linalg.matrix_rank(moved[name]) == 8, "the third found four others"
        state = optimizer.state[model.get_parameter(name)]
        assert min(state["exp_avg"].shape) == 4
        assert min(state["projector"].ortho_matrix.shape) == 4
    for name in moved.keys() - projected:
        assert "projector" not in optimizer.state[model.get_parameter(name)], name
        assert moved[name].abs().max() > 0


def test_galore_adamw_is_adamw_in_the_projected_space(tmp_path: Path) -> None:
    """At full rank. Adam's first step is the sign of the projected gradient, but for epsilon."""
    model = Tiny()
    settings = {"rank": 64, "update_every": 200, "scale": 0.25}
    config = configured(tmp_path, "galore-adamw", **FULL, training={"galore": settings})
    optimizer = with_galore(config, model)
    optimizer.param_groups[1]["lr"] = RATE
    weight = model.body[0].weight
    before, gradient = weight.detach().clone(), torch.randn(128, 64)
    weight.grad = gradient.clone()
    optimizer.step()
    _, _, right = torch.linalg.svd(gradient, full_matrices=False)
    low = gradient @ right.T
    step = low / (low.abs() + 1e-6 / 0.001**0.5)
    expected = before - RATE * 0.25 * step @ right
    assert (weight - expected).abs().max() < 1e-5


def test_the_8_bit_one_moves_what_the_other_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself it decays weights, and leaves small layers where they are.

    Its step waits for the GPU, even where there is none.
    """
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    moved = []
    for name in ("galore-adamw", "galore-adamw-8bit"):
        model = Tiny()
        optimizer = with_galore(
            configured(tmp_path, name, **FULL, training={"galore": {"rank": 4}}), model
        )
        assert isinstance(optimizer, GaLoreAdamW8bit) == name.endswith("8bit")
        before = [parameter.detach().clone() for parameter in model.parameters()]
        generator = torch.Generator().manual_seed(1)
        for group in optimizer.param_groups:
            group["lr"] = RATE
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        moved.append([p.detach() - old for p, old in zip(model.parameters(), before, strict=True)])
    for one, other in zip(*moved, strict=True):
        assert one.abs().mean() > RATE / 100
        assert (one - other).abs().max() < RATE / 20


# --- what is missing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "sections", "says"),
    [
        (
            "schedule-free-adamw",
            {},
            "training.optimizer: schedule-free-adamw needs the package schedulefree; pip install "
            "'orpo_ray[schedule-free]'",
        ),
        (
            "galore-adamw",
            FULL,
            "training.optimizer: galore-adamw needs the package galore-torch; pip install "
            "'orpo_ray[galore]'",
        ),
    ],
)
def test_a_missing_package_is_named_before_the_run_starts(
    optimizer: str,
    sections: dict[str, Any],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configured(tmp_path, optimizer, **sections)
    refuse_missing_optimizer(config, "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError) as caught:
        refuse_missing_optimizer(config, "cpu")
    assert str(caught.value) == says


def test_what_runs_on_a_gpu_only_is_refused_on_a_cpu(tmp_path: Path) -> None:
    config = configured(tmp_path, "galore-adamw-8bit", **FULL)
    refuse_missing_optimizer(config, "cuda")
    with pytest.raises(ResourceError, match="galore-adamw-8bit runs on a GPU only; set"):
        refuse_missing_optimizer(config, "cpu")
