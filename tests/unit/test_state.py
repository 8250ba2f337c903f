"""After a resume, optimizers take the same next steps and generators draw the same next numbers."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from galore_torch import GaLoreAdamW, GaLoreAdamW8bit
from safetensors.torch import load_file
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn

from orpo_ray.training.optimizers import mended
from orpo_ray.training.state import (
    STATE_FILE,
    capture_random_state,
    collect_state,
    load_optimizer,
    load_parameters,
    masters,
    restore_random_state,
    save_state,
    seed_process,
)
from orpo_ray.training.world import ALONE

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

GALORE = {"rank": 32, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std"}
"""The projection is found anew in every second step, so also after the resume."""


def schedule_free(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = AdamWScheduleFree(parameters, lr=0.1, warmup_steps=2)
    optimizer.train()
    return optimizer


def project_large(kind: Any) -> Build:
    """GaLore on the matrices, as transformers groups them."""

    def build(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        large = [parameter for parameter in parameters if parameter.ndim == 2]
        others = [parameter for parameter in parameters if parameter.ndim != 2]
        return mended(kind([{"params": others}, {"params": large, **GALORE}], lr=0.1))

    return build


OPTIMIZERS: dict[str, Build] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "adamw-8bit": lambda parameters: bnb.optim.AdamW(parameters, lr=0.1, optim_bits=8),
    "paged-adamw-8bit": lambda parameters: bnb.optim.AdamW(
        parameters, lr=0.1, optim_bits=8, is_paged=True
    ),
    "paged-adamw": lambda parameters: bnb.optim.AdamW(parameters, lr=0.1, is_paged=True),
    "lion": lambda parameters: bnb.optim.Lion(parameters, lr=0.1),
    "lion-8bit": lambda parameters: bnb.optim.Lion(parameters, lr=0.1, optim_bits=8),
    "paged-lion-8bit": lambda parameters: bnb.optim.Lion(
        parameters, lr=0.1, optim_bits=8, is_paged=True
    ),
    "ademamix": lambda parameters: bnb.optim.AdEMAMix(parameters, lr=0.1, t_alpha=6, t_beta3=6),
    "paged-ademamix-8bit": lambda parameters: bnb.optim.AdEMAMix(
        parameters, lr=0.1, t_alpha=6, t_beta3=6, optim_bits=8, is_paged=True
    ),
    "schedule-free-adamw": schedule_free,
    "galore-adamw": project_large(GaLoreAdamW),
    "galore-adamw-8bit": project_large(GaLoreAdamW8bit),
}
LARGE, SMALL = (64, 128), (128,)
"""bitsandbytes keeps 32-bit state for parameters of fewer than 4096 values."""


class Model(nn.Module):
    """A large and a small trained parameter and a frozen one, in either order."""

    def __init__(self, backwards: bool = False) -> None:
        super().__init__()
        shapes = {"large": LARGE, "frozen": LARGE, "small": SMALL}
        for name in list(shapes)[:: -1 if backwards else 1]:
            self.register_parameter(
                name, nn.Parameter(torch.zeros(shapes[name]), requires_grad=name != "frozen")
            )

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def take_steps(model: Model, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for parameter in (model.large, model.small):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def save(model: Model, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    save_state(collect_state(model, optimizer, keep=True), folder)


def counted(group: dict[str, Any]) -> dict[str, Any]:
    """What a group counts for its parameters, and its settings."""
    return {key: value for key, value in group.items() if key not in ("params", "scheduled_lr")}


def load(model: Model, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    load_parameters(model, folder)
    load_optimizer(model, optimizer, folder, ALONE)


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    found = {}
    for key, value in optimizer.state[parameter].items():
        found[key] = torch.as_tensor(getattr(value, "ortho_matrix", value))
    return found


@pytest.fixture(autouse=True)
def galore_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """GaLore's 8-bit step waits for the GPU, even where there is none."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.filterwarnings(
    "ignore:Paged optimizers are not supported on CPU", "ignore:This implementation of AdamW"
)
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_continues_bit_for_bit(name: str, backwards: bool, tmp_path: Path) -> None:
    """State is found by a parameter's name, so the order of parameters does not count."""
    model = Model()
    optimizer = OPTIMIZERS[name](model.trained)
    take_steps(model, optimizer, range(3))
    save(model, optimizer, tmp_path)
    again = Model(backwards)
    resumed = OPTIMIZERS[name](again.trained)
    load(again, resumed, tmp_path)
    for side in ("large", "small"):
        before, after = (
            state_of(optimizer, getattr(model, side)),
            state_of(resumed, getattr(again, side)),
        )
        assert before.keys() == after.keys()
        assert all(
            torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype
            for key in before
        )
    assert [counted(group) for group in optimizer.param_groups] == [
        counted(group) for group in resumed.param_groups
    ]
    take_steps(model, optimizer, range(3, 6))
    take_steps(again, resumed, range(3, 6))
    assert torch.equal(model.large, again.large)
    assert torch.equal(model.small, again.small)
    # Two steps of Lion may cancel each other, as each has the same size.
    assert (model.large != 0).float().mean() > 0.5


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["adamw-8bit", "paged-adamw-8bit", "galore-adamw-8bit"])
def test_8_bit_state_stays_8_bit_on_disk(name: str, tmp_path: Path) -> None:
    model = Model()
    optimizer = OPTIMIZERS[name](model.trained)
    take_steps(model, optimizer, range(2))
    save(model, optimizer, tmp_path)
    tensors = load_file(tmp_path / STATE_FILE)
    assert tensors["large/state1"].dtype == tensors["large/state2"].dtype == torch.uint8
    assert tensors["small/state1"].dtype == torch.float32
    assert tensors["large/step"].item() == 2
    assert {
        "large/absmax1",
        "large/qmap1",
        "large/absmax2",
        "large/qmap2",
        "large/master",
    } <= tensors.keys()
    assert not [key for key in tensors if key.startswith("frozen")]


def test_a_parameter_that_was_never_stepped_has_only_its_value(tmp_path: Path) -> None:
    model = Model()
    optimizer = OPTIMIZERS["adamw"](model.trained)
    with torch.no_grad():
        model.large.fill_(2.5)
    save(model, optimizer, tmp_path)
    again = Model()
    resumed = OPTIMIZERS["adamw"](again.trained)
    load(again, resumed, tmp_path)
    assert set(load_file(tmp_path / STATE_FILE)) == {"large/master", "small/master"}
    assert (again.large == 2.5).all()
    assert not resumed.state[again.large]


def test_state_of_a_parameter_that_is_no_longer_trained_is_an_error(tmp_path: Path) -> None:
    model = Model()
    optimizer = OPTIMIZERS["adamw"](model.trained)
    take_steps(model, optimizer, range(1))
    save(model, optimizer, tmp_path)
    fewer = Model()
    fewer.small.requires_grad_(False)
    with pytest.raises(AssertionError, match="not trained"):
        load(fewer, OPTIMIZERS["adamw"](fewer.trained), tmp_path)


def test_processes_that_do_not_keep_the_state_get_nothing() -> None:
    model = Model()
    optimizer = OPTIMIZERS["adamw"](model.trained)
    take_steps(model, optimizer, range(1))
    assert collect_state(model, optimizer, keep=False) == {}


def test_collected_state_is_a_copy_whose_masters_are_the_parameters_by_name() -> None:
    """It is a copy, so that training may continue while it is written."""
    model = Model()
    optimizer = OPTIMIZERS["adamw"](model.trained)
    take_steps(model, optimizer, range(2))
    collected = collect_state(model, optimizer, keep=True)
    kept = masters(collected)
    assert kept.keys() == {"large", "small"}
    assert torch.equal(kept["large"], model.large)
    assert torch.equal(kept["small"], model.small)
    before = {name: tensor.clone() for name, tensor in collected.items()}
    take_steps(model, optimizer, range(2, 3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in collected.items())
    assert not torch.equal(kept["large"], model.large)


def draws() -> list[float]:
    """The next numbers of every generator, with Gaussian pairs and dropout."""
    gauss = [
        random.random(),
        random.gauss(0, 1),
        float(np.random.normal()),
        float(np.random.random()),
    ]
    return gauss + torch.rand(3).tolist() + nn.functional.dropout(torch.ones(8), 0.5).tolist()


def test_random_states_survive_json() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draws()
    np.random.normal()  # NumPy draws two Gaussian numbers and caches the second
    state = json.loads(json.dumps(capture_random_state()))
    expected = [draws(), draws()]
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    assert draws() != expected[0]
    restore_random_state(state)
    assert [draws(), draws()] == expected


def test_capturing_the_random_state_does_not_move_it() -> None:
    torch.manual_seed(5)
    capture_random_state()
    after = torch.rand(4)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(4))


def test_each_rank_and_each_step_seeds_its_own_numbers() -> None:
    def after(seed: int, step: int, rank: int) -> tuple[float, ...]:
        seed_process(seed, step, rank)
        return tuple(draws())

    places = [(seed, step, rank) for seed in (0, 1) for step in (0, 7) for rank in (1, 2)]
    assert len({after(*place) for place in places}) == len(places)
    assert after(1, 7, 2) == after(1, 7, 2)
