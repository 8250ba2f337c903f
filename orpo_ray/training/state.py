"""What an exact resume needs of a live run: parameters and optimizer state by name, random states."""

import base64
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STATE_FILE = "state.safetensors"
_MASTER = "master"


def save_state(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write every trained parameter with its optimizer state to one safetensors file."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trained(model):
        tensors[f"{name}/{_MASTER}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}/{key}"] = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
    save_file({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}, folder / STATE_FILE)


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Put parameters and optimizer state back. The model must train the same parameters as when it was saved."""
    tensors = load_file(folder / STATE_FILE)
    if hasattr(optimizer, "check_overrides"):
        optimizer.check_overrides()  # bitsandbytes decides here which parameters keep 32-bit state
    place = {p: (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])}
    for name, parameter in _trained(model):
        with torch.no_grad():
            parameter.copy_(tensors.pop(f"{name}/{_MASTER}"))
        keys = [full for full in tensors if full.rpartition("/")[0] == name]
        stored = {full.rpartition("/")[2]: tensors.pop(full) for full in keys}
        _fill(optimizer, parameter, place[parameter], stored)
    assert not tensors, f"the checkpoint holds state of parameters that are not trained: {sorted(tensors)[:3]}"


def _fill(
    optimizer: torch.optim.Optimizer, parameter: Tensor, place: tuple[int, int], stored: dict[str, Tensor]
) -> None:
    """Give one parameter its optimizer state; bitsandbytes makes its own (maybe paged) buffers first."""
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
            # torch keeps the step counter on the CPU whatever the device
            state[key] = value if key == "step" else value.to(parameter.device)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def capture_random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's random generators as plain JSON values."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the random generators back; CUDA ones as far as this machine has the devices."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(state["torch"]))
    for device, encoded in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_decode(encoded), device)


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
