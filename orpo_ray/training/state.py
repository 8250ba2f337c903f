"""The state that an exact resume needs.

It is every trained parameter with its optimizer state, by name, and the random states.
"""

import base64
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import set_seed

from orpo_ray.training import zero
from orpo_ray.training.world import World

STATE_FILE = "state.safetensors"
_MASTER = "master"
_COUNTED_BY_GROUP = ("k", "weight_sum", "lr_max")
"""What schedule-free AdamW counts once for a group of parameters."""
_OF_GROUP = "group."
_PROJECTOR, _STRIDES = "projector", "projector.strides"
"""GaLore's object with the matrix that projects a gradient, and the order of it in memory.

A product of the same matrix in another order is added up otherwise, so its last bits differ.
"""


def collect_state(model: nn.Module, optimizer: Any, keep: bool) -> dict[str, Tensor]:
    """Every trained parameter and its optimizer state by name, whole and on the CPU.

    `optimizer` is torch's, that of another library, or one of ZeRO's. Every rank must call this.
    Without `keep` a rank gets {}.
    """
    tensors: dict[str, Tensor] = {}
    places = _places(optimizer)
    sharded = zero.is_sharded(optimizer)
    if sharded:
        zero.link_state(optimizer)
    for name, parameter in _trained(model):
        if sharded:
            whole, state = zero.full_parameter(parameter), zero.full_state(optimizer, parameter)
        else:
            group = optimizer.param_groups[places[parameter][0]]
            whole, state = parameter.detach(), _plain(optimizer.state[parameter], group)
        if keep:
            tensors[f"{name}/{_MASTER}"] = _to_cpu(whole)
            tensors |= {f"{name}/{key}": _to_cpu(value) for key, value in state.items()}
    return tensors


def masters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained parameters by name, from the tensors of `collect_state`."""
    return {
        name.removesuffix(f"/{_MASTER}"): tensor
        for name, tensor in tensors.items()
        if name.endswith(f"/{_MASTER}")
    }


def save_state(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write the tensors of `collect_state` to one safetensors file."""
    save_file(tensors, folder / STATE_FILE)


def load_parameters(model: nn.Module, folder: Path) -> None:
    """Load the trained parameters into the model, before DeepSpeed shards it.

    The model must train the same parameters as when they were saved.
    """
    with safe_open(folder / STATE_FILE, framework="pt") as file, torch.no_grad():
        names = list(file.keys())
        left = {key.removesuffix(f"/{_MASTER}") for key in names if key.endswith(f"/{_MASTER}")}
        for name, parameter in _trained(model):
            # They are read one at a time, because all of a whole model would take much memory.
            parameter.copy_(file.get_tensor(f"{name}/{_MASTER}"))
            left.remove(name)
    assert not left, (
        f"the checkpoint holds state of parameters that are not trained: {sorted(left)[:3]}"
    )


def load_optimizer(model: nn.Module, optimizer: Any, folder: Path, world: World) -> None:
    """Load the optimizer state, whatever strategy and number of processes saved it."""
    sharded = zero.is_sharded(optimizer)
    if hasattr(optimizer, "check_overrides"):
        optimizer.check_overrides()  # bitsandbytes decides here which parameters keep 32-bit state
    places = _places(optimizer)
    with safe_open(folder / STATE_FILE, framework="pt") as file:
        keys: dict[str, list[str]] = {}
        for full_name in file.keys():  # noqa: SIM118 - the file is no dictionary
            name, _, key = full_name.rpartition("/")
            keys.setdefault(name, []).append(key)
        if sharded:
            zero.make_state(optimizer, file.get_tensor(f"{next(iter(keys))}/step").item())
        for name, parameter in _trained(model):
            stored = {key: file.get_tensor(f"{name}/{key}") for key in keys[name] if key != _MASTER}
            if sharded:
                zero.fill_state(parameter, stored, world.rank, world.size)
            else:
                _fill(optimizer, parameter, places[parameter], stored)


def _to_cpu(value: Any) -> Tensor:
    if isinstance(value, float):
        value = torch.tensor(value, dtype=torch.float64)  # a float of Python has 64 bits
    return torch.as_tensor(value).detach().cpu().contiguous().clone()


def _places(optimizer: Any) -> dict[Tensor, tuple[int, int]]:
    """The group of each parameter, and its place in the group."""
    return {
        parameter: (group_number, index)
        for group_number, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
    }


def _plain(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as tensors and numbers, with what its group counts for it."""
    counted = {f"{_OF_GROUP}{key}": group[key] for key in _COUNTED_BY_GROUP if key in group}
    found = {**state, **(counted if state else {})}
    if _PROJECTOR in found:
        matrix = found[_PROJECTOR].ortho_matrix
        found |= {_PROJECTOR: matrix, _STRIDES: torch.tensor(matrix.stride())}
    return found


def _fill(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    place: tuple[int, int],
    stored: dict[str, Tensor],
) -> None:
    """Give one parameter its state.

    bitsandbytes first makes its own buffers, which may be paged. GaLore's have a lower rank than
    it would make here.
    """
    state, group = optimizer.state[parameter], optimizer.param_groups[place[0]]
    if _PROJECTOR in stored:
        strides, matrix = stored.pop(_STRIDES).tolist(), stored.pop(_PROJECTOR)
        matrix = matrix.to(parameter.device)
        placed = matrix.new_empty_strided(matrix.shape, strides).copy_(matrix)
        state[_PROJECTOR] = _projector(group, placed)
    elif stored and hasattr(optimizer, "init_state"):
        optimizer.init_state(group, parameter, *place)
    for key, value in stored.items():
        made = state.get(key)
        if key.startswith(_OF_GROUP):
            group[key.removeprefix(_OF_GROUP)] = value.item()
        elif isinstance(made, Tensor):
            made.copy_(value)
        elif not value.ndim and not value.is_floating_point():
            state[key] = value.item()
        else:
            # torch keeps the step counter on the CPU, whatever the device of the parameter.
            state[key] = value if key == "step" else value.to(parameter.device)


def _projector(group: dict[str, Any], matrix: Tensor) -> Any:
    from galore_torch.galore_projector import GaLoreProjector

    settings = {key: group[key] for key in ("rank", "update_proj_gap", "scale", "proj_type")}
    made = GaLoreProjector(**settings)
    made.ortho_matrix = matrix
    return made


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    ]


def capture_random_state() -> dict[str, Any]:
    """The states of the random generators of Python, NumPy and torch, as JSON values."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore this process's random generators, and that of its GPU if it has one now."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def seed_process(seed: int, step: int, rank: int) -> None:
    """Seed a process that has no random state to resume from.

    Each rank then draws its own dropout.
    """
    set_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
