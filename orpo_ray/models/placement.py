"""Where the weights of a written model go while it is compared: in memory, or left on disk."""

from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from orpo_ray.config.model import ModelConfig
from orpo_ray.models.size import model_without_numbers
from orpo_ray.models.weights import Weights

_USABLE = 0.9
"""The share of the free memory that weights may take; the rest is for what is computed."""


def free_memory(device: str) -> int:
    """Bytes that are free on a device."""
    if device == "cpu":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info()
    return int(free)


def fits(weights: Weights, dtype: torch.dtype, device: str) -> bool:
    """Whether a model fits into the memory of a device in a number format."""
    return weights.numbers * dtype.itemsize <= free_memory(device) * _USABLE


def placement(folder: Path, dtype: torch.dtype, device: str) -> dict[str, str]:
    """The `device_map` with which transformers loads a folder.

    If the model does not fit, its layers stay on disk and are read when they are computed.
    """
    if fits(Weights(folder), dtype, device):
        return {"": device}
    model = model_without_numbers(ModelConfig(base=str(folder), quantization="none"))
    layers = _layers(model)
    others = {
        name: device
        for name, module in model.named_modules()
        if not any(module.children()) and not name.startswith(f"{layers}.")
    }
    return {**others, layers: "disk"}


def _layers(model: PreTrainedModel) -> str:
    """The name of the module that holds the layers: the largest list."""
    sizes: dict[str, int] = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    return max(sizes, key=lambda name: sizes[name])
