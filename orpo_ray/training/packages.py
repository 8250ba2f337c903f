"""Checks before a run that what its optimizer needs is there. Nothing of it is imported."""

import importlib.util

from orpo_ray.config import RunConfig
from orpo_ray.config.optimizers import OPTIMIZERS
from orpo_ray.errors import ResourceError

_MODULES = {
    "schedulefree": ("schedulefree", "schedule-free"),
    "galore-torch": ("galore_torch", "galore"),
}
"""The module and our extra of each package that is not always installed."""


def refuse_missing_optimizer(config: RunConfig, device: str) -> None:
    """Raise ResourceError if the optimizer's package or the device that it needs is not there."""
    name, kind = config.training.optimizer, OPTIMIZERS[config.training.optimizer]
    if kind.package:
        module, extra = _MODULES[kind.package]
        if importlib.util.find_spec(module) is None:
            raise ResourceError(
                f"training.optimizer: {name} needs the package {kind.package}; pip install "
                f"'orpo_ray[{extra}]'"
            )
    if kind.needs_gpu and device == "cpu":
        raise ResourceError(
            f"training.optimizer: {name} runs on a GPU only; set training.optimizer=galore-adamw"
        )
