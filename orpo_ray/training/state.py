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


def collect_state(model: nn.Module, optimizer: Any, keep: bool) -> dict[str, Tensor]:
    """Every trained parameter and its optimizer state by name, whole and on the CPU.

    `optimizer` is torch's, bitsandbytes' or one of ZeRO's. Every rank must call this. Without
    `keep` a rank gets {}.
    """
    tensors: dict[str, Tensor] = {}
    sharded = zero.is_sharded(optimizer)
    if sharded:
        zero.link_state(optimizer)
    for name, parameter in _trained(model):
        if sharded:
            whole, state = zero.full_parameter(parameter), zero.full_state(optimizer, parameter)
        else:
            whole, state = parameter.detach(), optimizer.state[parameter]
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
    place = {
        parameter: (group_number, index)
        for group_number, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
    }
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
                _fill(optimizer, parameter, place[parameter], stored)


def _to_cpu(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().cpu().contiguous().clone()


def _fill(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    place: tuple[int, int],
    stored: dict[str, Tensor],
) -> None:
    """Give one parameter its state.

    bitsandbytes first makes its own buffers, which may be paged.
    """
    state = optimizer.state[parameter]
    if stored and hasattr(optimizer, "init_state"):
        optimizer.init_state(optimizer.param_groups[place[0]], parameter, *place)
    for key, value in stored.items():
        made = state.get(key)
        if isinstance(made, Tensor):
            made.copy_(value)
        elif made is not None:
            state[key] = type(made)(value.item())
        else:
            # torch keeps the step counter on the CPU, whatever the device of the parameter.
            state[key] = value if key == "step" else value.to(parameter.device)


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
