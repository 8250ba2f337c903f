"""The trained part of a model: a new LoRA or DoRA adapter, an earlier adapter, or every weight."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from orpo_ray.config.model import AdapterConfig
from orpo_ray.errors import ConfigError
from orpo_ray.models.base import QUANTISED
from orpo_ray.models.trained import ADAPTER_CONFIG, find_adapter
from orpo_ray.runs.console import Announce

_STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_STATE_OUTPUT = ".out_proj"
"""The kernels of these models use this layer's weight themselves, so PEFT refuses it."""


def attach_adapter(
    base: PreTrainedModel, config: AdapterConfig, announce: Announce
) -> PeftModel | PreTrainedModel:
    """The model with its trainable part; the base itself if `kind: none` trains every weight."""
    if config.kind == "none":
        return base
    if config.init_from is not None:
        return _continue_adapter(base, config, announce)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # a divisor: PEFT takes any number
        lora_dropout=config.dropout,
        target_modules=config.targets if isinstance(config.targets, str) else list(config.targets),
        exclude_modules=_unfit_layers(base, announce) or None,
        use_dora=config.dora,
        use_rslora=config.rslora,
    )
    try:
        return get_peft_model(base, lora)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        # PEFT refuses dropout for the weights of experts if they are no modules of their own.
        setting = "dropout: set it to 0" if "lora_dropout" in reason else "targets"
        raise ConfigError(f"adapter.{setting}: {reason}") from error


def _unfit_layers(base: PreTrainedModel, announce: Announce) -> list[str]:
    """The linear layers that no adapter can sit on.

    Those of a vision or audio tower, which no text reaches, routers that return more than one
    tensor, and those of a state-space block that PEFT refuses. All but routers are announced.
    """
    linears = {
        name: module for name, module in base.named_modules() if isinstance(module, nn.Linear)
    }
    of_text = {id(module) for module in base.get_decoder().modules()}
    has_towers = base.config.get_text_config() is not base.config
    head = base.get_output_embeddings()
    towers = [
        name
        for name, module in linears.items()
        if has_towers and id(module) not in of_text and module is not head
    ]
    if towers:
        announce(f"{len(towers)} layers that no text reaches get no adapter, such as {towers[0]}")
    has_states = base.config.model_type in _STATE_SPACE
    blocks = [name for name in linears if has_states and name.endswith(_STATE_OUTPUT)]
    if blocks:
        announce(
            f"{len(blocks)} layers get no adapter, such as {blocks[0]}: PEFT takes none there in a "
            f"{base.config.model_type} model"
        )
    routers = [name for name, module in linears.items() if not _is_plain(module)]
    return sorted({*towers, *blocks, *routers})


def _is_plain(module: nn.Linear) -> bool:
    """Whether a linear layer computes what its name says: bitsandbytes' layers do."""
    return type(module).forward is nn.Linear.forward or isinstance(module, QUANTISED)


def load_adapter(
    base: PreTrainedModel, path: str, *, trainable: bool, dropout: float = 0.0
) -> PeftModel:
    """The base with an adapter from disk on it.

    Raises ConfigError if the adapter does not fit the base.
    """
    folder = find_adapter(path)
    _read_adapter_config(folder)
    if not (folder / "adapter_model.safetensors").is_file():
        raise ConfigError(
            f"{folder}: no adapter_model.safetensors; only safetensors adapters are loaded"
        )
    adapter_config = LoraConfig.from_pretrained(str(folder))
    adapter_config.lora_dropout = dropout
    adapter_config.inference_mode = not trainable
    try:
        return PeftModel.from_pretrained(
            base, folder, config=adapter_config, is_trainable=trainable
        )
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"{folder}: this adapter does not fit the base: {str(error).splitlines()[0]}"
        ) from error


def _continue_adapter(
    base: PreTrainedModel, config: AdapterConfig, announce: Announce
) -> PeftModel:
    assert config.init_from is not None
    folder = find_adapter(config.init_from)
    _refuse_other_shape(config, _read_adapter_config(folder), folder)
    announce(f"adapter starts from {folder}")
    return load_adapter(base, config.init_from, trainable=True, dropout=config.dropout)


def _read_adapter_config(folder: Path) -> dict[str, Any]:
    """What PEFT wrote about an adapter.

    Raises ConfigError if the file is broken or the adapter is not a LoRA adapter.
    """
    try:
        found: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        kind = found.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder}: adapter_config.json cannot be read: {error}") from error
    if kind != "LORA":
        raise ConfigError(f"{folder}: an adapter of type {kind}; only LoRA and DoRA are supported")
    return found


def _refuse_other_shape(config: AdapterConfig, found: dict[str, Any], folder: Path) -> None:
    """Raise ConfigError if a setting does not agree with the adapter of `init_from`.

    The shape of an adapter cannot be changed after it is made.
    """
    asked = {"r": (config.r, found.get("r")), "alpha": (config.alpha, found.get("lora_alpha"))}
    asked["dora"] = (config.dora, found.get("use_dora", False))
    asked["rslora"] = (config.rslora, found.get("use_rslora", False))
    for key, (wanted, stored) in asked.items():
        if wanted != stored:
            raise ConfigError(
                f"adapter.{key}: {wanted} here, but init_from {folder} has {stored}; use the same "
                "value"
            )
    if config.targets != "all-linear" and not _same_targets(
        config.targets, found["target_modules"]
    ):
        raise ConfigError(
            f"adapter.targets: {list(config.targets)} here, but init_from {folder} has others; use "
            "its own"
        )


def _same_targets(asked: Sequence[str], stored: Sequence[str]) -> bool:
    """Whether two lists of targets mean the same layers.

    PEFT keeps a target as a name or as a whole path. A name means every path that ends with it.
    """

    def means(name: str, path: str) -> bool:
        return f".{path}".endswith(f".{name}")

    found = [path for path in stored if any(means(name, path) for name in asked)]
    return len(found) == len(stored) and all(
        any(means(name, path) for path in stored) for name in asked
    )
